"""Provide documents for the tests of the data room."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

from bd3_scale.data.manifest import load_manifest

SEQ_LEN = 32


def used_bytes(folder: Path) -> int:
    """Return the bytes used by all files of a folder, from which other processes may remove some meanwhile."""
    total = 0
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def steps_per_epoch(folder: Path, global_batch_size: int = 4) -> int:
    """Return the steps of an epoch of prepared data, or of a cache of them."""
    train = load_manifest(folder).train
    assert train is not None
    return train.sequences // global_batch_size


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def random_texts(count: int, seed: int = 0, longest: int = 90) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh é日\n", k=rng.randint(1, longest))) for _ in range(count)]
