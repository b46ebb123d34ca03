"""Import MosaicML streaming; the package imports it only here.

Two things are changed. It is imported without transformers and torchvision, and the encoding of a column is parsed
once, not for every sample. Its `StreamingDataset` is not used: in every process it holds eight bytes of each sample
and an object of each shard.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

_KINDS_OF_BATCHES = {
    "transformers.feature_extraction_utils": "BatchFeature",
    "transformers.tokenization_utils_base": "BatchEncoding",
}


def _import_streaming() -> None:
    """Import streaming without its ready-made data sets of text and images, and without transformers.

    The package does not use them, and they import transformers and torchvision: that costs seconds at every start, and
    fails if torchvision is broken, as a CUDA build next to a CPU torch is. Streaming's own loader only needs two batch
    classes of transformers for an isinstance check, which empty classes satisfy.
    """
    names = ["streaming.multimodal", "streaming.text", "streaming.vision"]
    if "transformers" not in sys.modules:
        names += ["transformers", *_KINDS_OF_BATCHES]
    left_out = {name: ModuleType(name) for name in names if name not in sys.modules}
    for name in left_out.keys() & _KINDS_OF_BATCHES:
        setattr(left_out[name], _KINDS_OF_BATCHES[name], type(_KINDS_OF_BATCHES[name], (), {}))
    sys.modules |= left_out
    streaming = importlib.import_module("streaming")
    for name in left_out:
        del sys.modules[name]
        vars(streaming).pop(name.removeprefix("streaming."), None)


_import_streaming()

import streaming.base.format.mds.encodings as streaming_encodings  # noqa: E402
from streaming import MDSWriter  # noqa: E402
from streaming.base.format import reader_from_json  # noqa: E402
from streaming.base.format.mds.encodings import mds_decode  # noqa: E402
from streaming.base.shuffle import get_shuffle  # noqa: E402
from streaming.base.storage.download import CloudDownloader  # noqa: E402

__all__ = [
    "CloudDownloader",
    "MDSWriter",
    "get_shuffle",
    "mds_decode",
    "reader_from_json",
]


streaming_encodings._get_coder = functools.cache(streaming_encodings._get_coder)
