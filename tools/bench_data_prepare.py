"""Prepare text, by bd3_scale and by others, for tools/bench_data.py; each function runs in a process."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any, get_args

from bd3_scale.data.packing import Packing
from tools.bench_data_child import cpu_seconds

SEQ_LEN = 1024
BATCH = 256
EOS = "<|endoftext|>"


def corpus(text: str, out: str, megabytes: float, vocab_size: int) -> dict[str, Any]:
    """Write `documents.jsonl`, `lines.jsonl` (a tenth of it, a line a document) and a tokeniser trained on them."""
    from bd3_scale.data.tokenizer import train_tokenizer

    folder, size, lines = Path(out), 0, 0
    with (folder / "documents.jsonl").open("w") as documents, (folder / "lines.jsonl").open("w") as short:
        for found in _texts(text):
            documents.write(json.dumps({"text": found}) + "\n")
            size += len(found.encode())
            for line in filter(str.strip, found.splitlines()):
                if lines < megabytes * 1e5:
                    short.write(json.dumps({"text": line}) + "\n")
                    lines += len(line.encode())
            if size > megabytes * 1e6:
                break
    train_tokenizer([folder / "documents.jsonl"], folder / "tokenizer", vocab_size, progress=False)
    return {"megabytes": size / 1e6}


def _texts(text: str) -> Iterator[str]:
    """Yield the documents of a folder, by default the sources of Python's library."""
    from bd3_scale.data.sources import DocumentReader

    if text:
        yield from (document.text for document in DocumentReader([text]))
        return
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts and (found := path.read_text(errors="ignore")).strip():
            yield found


def bd3_scale(data: str, out: str) -> dict[str, Any]:
    """Run `bd3-scale data prepare` in this process and one that it starts."""
    from bd3_scale.data import mosaicml  # noqa: F401 - imports are not counted, in no process
    from bd3_scale.data.prepare import prepare
    from bd3_scale.data.tokenizer import load_tokenizer

    def work() -> None:
        tokenizer = load_tokenizer(f"{data}/tokenizer")
        prepare([f"{data}/documents.jsonl"], out, tokenizer, SEQ_LEN, holdout=0.0, workers=1, progress=False)

    return _spent(work)


def tokenizers(data: str, out: str) -> dict[str, Any]:
    """Encode texts in memory, and store nothing."""
    backend = _backend(data)
    texts = [json.loads(line)["text"] for line in Path(data, "documents.jsonl").read_text().splitlines()]

    def work() -> None:
        for start in range(0, len(texts), BATCH):
            backend.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)

    return _spent(work)


def datatrove(data: str, out: str) -> dict[str, Any]:
    """Read and tokenise with datatrove's pipeline, unshuffled, into its file of tokens."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    how = {"tokenizer_name_or_path": f"{data}/tokenizer/tokenizer.json", "eos_token": EOS, "shuffle_documents": False}
    steps = [JsonlReader(f"{data}/documents.jsonl"), DocumentTokenizer(out, **how)]
    return _spent(LocalPipelineExecutor(pipeline=steps, tasks=1, workers=1, logging_dir=f"{out}-logs").run)


def datasets(data: str, out: str) -> dict[str, Any]:
    """Read, tokenise and cut into sequences as the examples of transformers do, and save that."""
    import datasets

    backend = _backend(data)
    eos = backend.token_to_id(EOS)

    def tokenised(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"ids": [[*one.ids, eos] for one in backend.encode_batch_fast(batch["text"], add_special_tokens=False)]}

    def grouped(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        ids = list(chain(*batch["ids"]))
        return {"ids": [ids[start : start + SEQ_LEN] for start in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN)]}

    def work() -> None:
        # A cache of this round only: an earlier round's would be reused.
        kept = f"{out}-cache"
        found = datasets.load_dataset("json", data_files=f"{data}/documents.jsonl", split="train", cache_dir=kept)
        how = {"batched": True, "remove_columns": found.column_names}
        found.map(tokenised, batch_size=BATCH, **how).map(grouped, batched=True).save_to_disk(out)

    return _spent(work)


def megatron(data: str, out: str) -> dict[str, Any]:
    """Read, tokenise document by document and build `.bin` and `.idx`, as its preprocess_data.py does."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    backend = _backend(data)
    eos = backend.token_to_id(EOS)

    def work() -> None:
        builder = IndexedDatasetBuilder(f"{out}.bin", dtype=np.uint16)
        with Path(data, "documents.jsonl").open() as lines:
            for line in lines:
                ids = [*backend.encode(json.loads(line)["text"], add_special_tokens=False).ids, eos]
                builder.add_document(torch.IntTensor(ids), [len(ids)])
        builder.finalize(f"{out}.idx")

    return _spent(work)


# Each with the packages that it needs.
CONTENDERS: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {
    "bd3-scale data prepare": (bd3_scale, ()),
    "bare tokenizers, which only encodes": (tokenizers, ()),
    "datatrove, DocumentTokenizer": (datatrove, ("datatrove",)),
    "datasets.map": (datasets, ("datasets",)),
    "Megatron, IndexedDatasetBuilder": (megatron, ("megatron.core",)),
}


def _backend(data: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(f"{data}/tokenizer/tokenizer.json")


def _spent(work: Callable[[], object]) -> dict[str, Any]:
    began = cpu_seconds()
    work()
    return {"seconds": cpu_seconds() - began}


def packed(data: str, out: str) -> dict[str, Any]:
    """Return the share of padding among all tokens, and of cut documents among those that fit into a sequence."""
    from bd3_scale.data.prepare import prepare
    from bd3_scale.data.statistics import statistics
    from bd3_scale.data.stored import StoredData
    from bd3_scale.data.tokenizer import load_tokenizer

    tokenizer, rows = load_tokenizer(f"{data}/tokenizer"), []
    for kind, name in (("one of the text's", "documents"), ("a line", "lines")):
        for multiple, packing in product((32, 4), get_args(Packing)):
            how: dict[str, Any] = {"document_multiple": multiple, "packing": packing, "holdout": 0.0, "workers": 1}
            prepare([f"{data}/{name}.jsonl"], out, tokenizer, SEQ_LEN, progress=False, **how)
            found = statistics(StoredData(out), "train")
            shutil.rmtree(out)
            if packing == "concatenate":  # of pieces otherwise
                mean = found.text_tokens / sum(found.document_lengths.values())
            rows.append(
                {
                    "kind": kind,
                    "tokens": mean,
                    "multiple": multiple,
                    "packing": packing,
                    "padding": (found.padding_tokens + found.filling_tokens) / (found.sequences * SEQ_LEN),
                    "cut": found.fitting_documents_cut / max(1, found.fitting_documents),
                }
            )
    return {"rows": rows}
