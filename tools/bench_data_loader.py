"""Read prepared tokens, by bd3_scale and by others, for tools/bench_data.py; each function runs in a process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from types import ModuleType, SimpleNamespace
from typing import Any

from tools.bench_data_child import cpu_seconds

SEQ_LEN = 1024
BATCH = 32
SEED = 1


def repeated(prefix: str, out: str, times: int) -> dict[str, Any]:
    """Write the documents of Megatron's `.bin` `times` times."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=np.uint16)
    for _ in range(times):
        builder.add_index(prefix)
    builder.finalize(f"{out}.idx")
    return {}


def chunks(source: str, out: str) -> dict[str, Any]:
    """Write Megatron's documents as litdata's chunks."""
    import numpy as np
    from litdata import TokensLoader, optimize
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    def documents(prefix: str) -> Iterator[Any]:
        for document in IndexedDataset(prefix):
            yield np.asarray(document)

    how: dict[str, Any] = {"chunk_bytes": "64MB", "item_loader": TokensLoader(), "num_workers": 1, "verbose": False}
    optimize(documents, [source], out, start_method="fork", **how)
    return {}


def bd3_scale(source: str, local: str, workers: int) -> dict[str, Any]:
    """Read batches as training receives them."""
    from bd3_scale.data.manifest import load_manifest
    from bd3_scale.data.stream import TrainingStream
    from bd3_scale.recipe.schema import DataRecipe

    def epochs() -> Iterator[Iterable[Any]]:
        manifest = load_manifest(local, source)
        recipe = DataRecipe(path=local, remote=source, seq_len=SEQ_LEN, num_workers=workers)
        stream = TrainingStream(recipe, manifest, global_batch_size=BATCH, dp_rank=0, dp_size=1, seed=SEED)
        assert manifest.train is not None
        while True:
            yield islice((batch.tokens for batch in stream), manifest.train.sequences // BATCH)

    return _spent(epochs)


def streaming(source: str, local: str, workers: int) -> dict[str, Any]:
    """Read the same shards with StreamingDataset, its order and its cache."""
    dataset_of = streaming_as_it_stands().StreamingDataset

    def epochs() -> Iterator[Iterable[Any]]:
        dataset = dataset_of(remote=source, local=local, split="train", shuffle=True, batch_size=BATCH)
        loader = batches_of(dataset, workers)
        while True:
            yield loader

    return _spent(epochs)


def streaming_as_it_stands() -> ModuleType:
    """Return MosaicML's package, without its sets of pictures: they import torchvision, which may be broken here."""
    for name in ("streaming.multimodal", "streaming.text", "streaming.vision"):
        sys.modules.setdefault(name, ModuleType(name))
    import streaming

    return streaming


def batches_of(dataset: Any, workers: int) -> Any:
    """Return PyTorch's loader of the `tokens` of MDS samples, int64 [B, L]."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader

    def collated(samples: list[dict[str, Any]]) -> Any:
        return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))

    return DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=collated, drop_last=True)


def litdata(source: str, local: str, workers: int) -> dict[str, Any]:
    """Read litdata's chunks from this disk, with its data set and loader."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    def epochs() -> Iterator[Iterable[Any]]:
        loads = TokensLoader(block_size=SEQ_LEN)
        dataset = StreamingDataset(f"{source}-chunks", cache_dir=local, item_loader=loads, shuffle=True, drop_last=True)
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)
        while True:
            yield (batch.long() for batch in loader)

    return _spent(epochs)


def megatron(source: str, local: str, workers: int) -> dict[str, Any]:
    """Read Megatron's memory-mapped documents as its GPTDataset gives them to pretraining."""
    import numpy as np
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split
    from torch.utils.data import DataLoader, Subset

    tokenizer = SimpleNamespace(vocab_size=1 << 16, eod=0, pad=-1, unique_identifiers={"name": "made up"})

    def epochs() -> Iterator[Iterable[Any]]:
        documents = IndexedDataset(source)
        config = GPTDatasetConfig(
            random_seed=SEED,
            sequence_length=SEQ_LEN,
            blend=([source], None),
            split="1,0,0",
            path_to_cache=local,
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        own = np.arange(len(documents.document_indices) - 1, dtype=np.int32)
        count = int(documents.sequence_lengths.sum()) // SEQ_LEN // BATCH * BATCH
        dataset = GPTDataset(documents, source, own, 2 * count, Split.train, config)
        for first in (0, count):
            part = Subset(dataset, range(first, first + count))
            yield (batch["tokens"] for batch in DataLoader(part, batch_size=BATCH, num_workers=workers))

    return _spent(epochs)


CONTENDERS: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {
    "bd3_scale, TrainingStream": (bd3_scale, ()),
    "StreamingDataset as it stands, the same shards": (streaming, ("streaming",)),
    "litdata, StreamingDataset": (litdata, ("litdata",)),
    "Megatron, GPTDataset on `.bin`": (megatron, ("megatron.core",)),
}


def _spent(epochs: Callable[[], Iterator[Iterable[Any]]]) -> dict[str, Any]:
    """Return tokens per CPU second of the first epoch, including opening the data, and of the second."""
    import torch

    torch.set_num_threads(1)
    found, began = [], cpu_seconds()
    for epoch in islice(epochs(), 2):
        read = 0
        for batch in epoch:
            assert batch.dtype == torch.int64
            assert batch.shape[1] == SEQ_LEN
            read += batch.numel()
        now = cpu_seconds()
        found.append(read / (now - began))
        began = now
    return {"first": found[0], "later": found[1]}
