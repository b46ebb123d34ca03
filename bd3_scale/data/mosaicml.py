"""MosaicML streaming as this package needs it; every import of it goes through here.

Two things are changed. It imports without transformers and torchvision, and how a column is encoded is read from its
name once, not for every sample. Its `StreamingDataset` is not used: it holds eight bytes of every sample and an object
of every shard in every process.
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

    Nothing here uses them, and they import transformers and torchvision: seconds at every start, and a failure where
    torchvision is broken, as a CUDA build of it beside a torch for CPU is. Streaming's own loader tells two kinds of
    batches of transformers from others; where transformers was not there before, it does not know them.
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
