"""Check that a stored trace is reused only where everything that matters is the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bd3_scale.plan import trace_cache
from bd3_scale.plan.hardware import load_hardware
from bd3_scale.plan.trace import Key, Message, Segment, Sent, Trace, Work
from bd3_scale.plan.trace_cache import traces_of
from tests.plan.layouts import job

TRACE = Trace(
    segments=[Segment("before", {"weights": 3.0})],
    work={Key("gradients", "mlp", "forward", "mm", "2x3x4"): Work(1, 48, 52)},
    messages={Key("update", "", "data", "allreduce_", ""): Message(tuple(range(0, 16, 2)), 1, 16, Work(2, 3, 4))},
    waits={"update: tolist at a.py:1": 2.0},
    micro_batches=2,
    flops=1e15,
    parameters=7,
)


@pytest.fixture
def traced(tmp_path, monkeypatch):
    """Return the list of jobs that are traced; other tests check tracing itself."""
    found = []

    def trace_all(jobs, *_, done, **__):
        found.extend(jobs)
        for _ in jobs:
            done()
        return [replace(TRACE, order=[Sent((0, 1), "allreduce_", "float32[4]", None)])] * len(jobs)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trace_cache, "trace_all", trace_all)
    return found


def asked(*jobs, hardware="h100", device="cuda"):
    told = []
    traces = traces_of(jobs, load_hardware(hardware), device=device, done=lambda: told.append(1))
    assert len(told) == len(jobs)
    return traces


def test_a_job_is_traced_once(traced):
    one, other = job("offload"), job("PP 4, next token")
    asked(one)
    again = asked(other, one)
    assert again[1] == TRACE
    assert traced == [one, other]


def test_what_matters_makes_another_trace(traced, monkeypatch):
    one = job("offload")
    asked(one)
    train = one.recipe.train.model_copy(update={"micro_batch_size": 1})
    for changed in (
        replace(one, micro_batches=one.micro_batches + 1),
        replace(one, rank=1),
        replace(one, steps=3),
        replace(one, whole=one.recipe.model.model_copy(update={"num_layers": 40})),
        replace(one, recipe=one.recipe.model_copy(update={"train": train})),
    ):
        asked(changed)
    asked(one, hardware="h200")
    asked(one, device="cpu")
    monkeypatch.setattr(trace_cache, "_source", lambda: "of another version")
    asked(one)
    assert len(traced) == 9


def test_what_does_not_matter_does_not(traced):
    one = job("offload")
    asked(one, replace(one, recipe=one.recipe.model_copy(update={"name": "another", "run_dir": "elsewhere"})))
    asked(replace(one, recipe=one.recipe.model_copy(update={"name": "another", "run_dir": "elsewhere"})))
    # Both were missing when they were requested together.
    assert len(traced) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"segments": [{"name": 1}]}', b"\xff\xfe"])
def test_a_damaged_file_is_made_anew(traced, damage):
    one = job("offload")
    asked(one)
    (path,) = trace_cache.folder().iterdir()
    path.write_bytes(damage)
    assert asked(one)[0].work == TRACE.work
    assert len(traced) == 2
    json.loads(path.read_text())


def test_what_goes_beyond_steps_is_another_trace(traced):
    asked(job("offload"))
    asked(job("offload", beyond=True))
    assert len(traced) == 2


def test_a_folder_that_cannot_be_written_is_no_error(traced, tmp_path, capsys):
    (tmp_path / "bd3_scale").write_text("a file in the way")
    assert asked(job("offload"))[0].flops == TRACE.flops
    assert "the next plan traces this again" in capsys.readouterr().err
