"""Run the engine turn by turn, so that what happens in between is known."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from bd3_scale.generate import open_writer
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.draft import Draft
from bd3_scale.generate.writer import Writer
from bd3_scale.serve.answers import Event, Listener, Piece
from bd3_scale.serve.engine import Engine, Job, Text
from bd3_scale.serve.server_metrics import ServerMetrics
from bd3_scale.serve.text_request import Run, TextRequest


@pytest.fixture(scope="module")
def writer(chat_checkpoint: Path) -> Iterator[Writer]:
    with open_writer(chat_checkpoint) as opened:
        yield opened


@pytest.fixture
def engine(writer: Writer) -> Engine:
    return Engine(writer, slots=2, waiting=9, cache_tokens=64, metrics=ServerMetrics())


def turn(engine: Engine) -> None:
    engine._turn(engine._orders())


def job(told: list[Draft | str], prompt: bytes | list[int] = b"ab", **sampling) -> Job:
    return Job(Text(list(prompt), SamplingConfig(**{"max_new_tokens": 6, **sampling}), 1), told.append)


def finish(engine: Engine) -> None:
    while engine._jobs or engine._waiting:
        turn(engine)


def test_a_text_that_is_cancelled_twice_frees_one_place(engine: Engine) -> None:
    told: list[list[Draft | str]] = [[] for _ in range(5)]
    first, *_, last = engine.submit([job(news) for news in told])
    turn(engine)
    engine.cancel([first])
    engine.cancel([first, last, 999])
    turn(engine)
    assert len(engine._jobs) == 2
    finish(engine)
    assert [bool(news) and news[-1].sample is not None for news in told] == [False, True, True, True, False]


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"prompt": [97, 9999]}, "index out of range"),  # it fails in the middle of a pass
        ({"unmasking": "static", "steps": 9}, "steps is 9"),  # refused before it joins the batch
    ],
    ids=["pass", "join"],
)
def test_a_text_that_fails_takes_no_place_and_the_engine_goes_on(engine: Engine, capfd, odd: dict, words: str) -> None:
    told: list[list[Draft | str]] = [[] for _ in range(3)]
    wrong, beside, later = told
    engine.submit([job(wrong, **odd), job(beside), job(later)])
    finish(engine)
    assert words in str(wrong[-1])
    assert str(beside[-1]).startswith("generation failed: ")  # which text caused it is unknown
    assert later[-1].sample is not None
    assert engine.failure is None
    assert "Traceback" in capfd.readouterr().err


def test_the_last_piece_is_the_text_that_generate_writes(writer: Writer) -> None:
    """Check also a text that little entropy ends: it leaves out tokens that a stream has shown already."""
    events: dict[str, list[Event]] = {"end": [], "blocks": []}
    writer = dataclasses.replace(writer, eos_ids=())
    sampling = SamplingConfig(max_new_tokens=400, min_entropy=5.5, seed=2)
    text = Text(list(b"ab"), sampling, 2)
    for tells, found in events.items():
        engine = Engine(writer, slots=1, waiting=1, cache_tokens=128, metrics=ServerMetrics())
        engine.submit([Job(text, Listener(writer, text, 0, found.append, engine.metrics, 2, tells))])
        finish(engine)
    (expected,) = writer.write(["ab"], sampling)
    assert expected.stopped_by == "entropy"
    (whole,) = events["end"]
    assert isinstance(whole, Piece)
    assert (whole.text, whole.tokens, whole.stopped_by) == (expected.text, len(expected.tokens), "entropy")
    assert len(events["blocks"]) > 60


def test_texts_whose_answer_nobody_asks_for_are_cancelled(engine: Engine) -> None:
    """Check a client that leaves before its stream begins, when no generator runs a `finally`."""
    text = Text(list(b"ab"), SamplingConfig(max_new_tokens=6), 1)

    async def ask() -> None:
        run = Run(engine, TextRequest([text, text, text], [2, 2, 2], None), None, 9.0, "blocks")
        turn(engine)
        assert (len(engine._jobs), len(engine._waiting)) == (2, 1)
        del run
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(ask())
    assert not engine._waiting
    turn(engine)
    assert not engine._jobs


def test_an_engine_that_has_ended_tells_all(engine: Engine) -> None:
    told: list[list[Draft | str]] = [[] for _ in range(4)]
    engine.submit([job(news, max_new_tokens=60) for news in told])
    engine.start()
    engine.stop()
    engine.stop()
    assert all(isinstance(news[-1], str) for news in told)
    with pytest.raises(RuntimeError, match="the server is stopping"):
        engine.submit([job([])])
