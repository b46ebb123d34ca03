"""Test what the decorator makes of errors; `tests/faults/test_readers.py` damages real files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tokenizers
from pydantic import BaseModel
from tokenizers import Regex, models, pre_tokenizers

from bd3_scale.checkpoint.manifest import CheckpointDamagedError
from bd3_scale.recipe.schema import RecipeError
from bd3_scale.resilience.readers import panics_as_value_errors, read_regular, reader


class Point(BaseModel):
    x: int
    y: int


def panic() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    backend.encode("a" * 60 + "b")


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: {}["x"], "KeyError: 'x'"),
        (lambda: json.loads("["), "Expecting value: line 1 column 2 (char 1)"),
        (lambda: json.loads("[" * 100_000), "it is nested too deeply"),
        (lambda: Point.model_validate({"x": "a"}), "x: Input should be a valid integer"),
        (lambda: [1] * (1 << 60), "it needs more memory than is available"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (panic, "PanicException: Onig: Regex search error"),
    ],
)
def test_every_error_becomes_one_line_that_names_the_file(action, words) -> None:
    @reader("a thing", path="file")
    def read(kind: str, file: Path) -> None:
        action()

    with pytest.raises(ValueError, match=r"^/a/file cannot be read as a thing: ") as caught:
        read("x", file=Path("/a/file"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("/a/file is empty: write something"),
        RecipeError(["of another file"], "b.yaml"),
        CheckpointDamagedError("checkpoint b is damaged"),
        FileNotFoundError("it is not there"),
        AssertionError("a bug of ours"),
        KeyboardInterrupt(),
    ],
)
def test_an_error_that_says_where_stays_as_it_is(error) -> None:
    @reader("a thing")
    def read(path: Path) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        read(Path("/a/file"))
    assert caught.value is error


def test_a_panic_is_told_and_nothing_else() -> None:
    with (
        pytest.raises(ValueError, match="the text cannot be encoded: PanicException"),
        panics_as_value_errors("the text cannot be encoded"),
    ):
        panic()
    with pytest.raises(KeyboardInterrupt), panics_as_value_errors("it"):
        raise KeyboardInterrupt


def test_a_file_is_regular_and_bounded(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    assert read_regular(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ValueError, match="is larger than"):
        read_regular(tmp_path / "a", 4)
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path} is not a regular file"):
            read_regular(path)
