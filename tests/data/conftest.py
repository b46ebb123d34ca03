from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from bd3_scale.data import split_writer
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from tests.data.documents import SEQ_LEN, random_texts, write_jsonl
from tests.data.tokenisers import Made, make

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make byte data of several small shards."""
    folder = tmp_path_factory.mktemp("prepared")
    source = write_jsonl(folder / "text.jsonl", random_texts(150))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_writer, "SHARD_BYTES", 2048)
        prepare(
            [source],
            folder / "data",
            load_tokenizer("bytes"),
            SEQ_LEN,
            document_multiple=8,
            holdout=0.2,
            workers=1,
            progress=False,
        )
    return folder / "data"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Make a tokeniser of each kind once for a module."""
    folder = tmp_path_factory.mktemp("kinds")
    found: dict[str, Made] = {}

    def of(name: str) -> Made:
        if name not in found:
            found[name] = make(folder / name, name)
        return found[name]

    return of
