"""Check the metrics file of whole, killed and resumed runs, and Weights & Biases writing offline."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bd3_scale.observe.loggers.base import LoggedRun
from bd3_scale.observe.loggers.run import RunLoggers
from bd3_scale.observe.metrics import (
    LINE_LIMIT,
    last_event,
    read_metrics,
    read_nelbos,
    truncate_after,
)
from bd3_scale.observe.plot import loss_curve
from bd3_scale.recipe.running import LoggingRecipe, WandbRecipe

OFF = WandbRecipe(mode="disabled")
EARLIER = Path(__file__).parents[1] / "fixtures" / "format-3" / "run"


def writer(run_dir: Path, after_step: int = 0, recipe: WandbRecipe = OFF) -> RunLoggers:
    config = {"seed": 1, "logging": {"wandb": recipe.model_dump()}}
    return RunLoggers(LoggedRun(run_dir, "tiny", config, after_step), LoggingRecipe(wandb=recipe))


def test_records_are_strict_json_lines_readable_before_the_end(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.log(1, {"train/loss": 2.5, "train/tokens": 7})
        metrics.log(2, {"train/loss": math.nan, "train/lr": math.inf})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 1, "train/loss": 2.5, "train/tokens": 7},
        {"step": 2, "train/loss": None, "train/lr": None},
    ]


def test_resuming_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with writer(tmp_path) as metrics:
        for step in range(1, 6):
            metrics.log(step, {"train/loss": float(step)})
        metrics.log(5, {"eval/nelbo": 3.0})
    with path.open("a") as file:
        file.write('{"step": 6, "train_lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5, 5]
    with writer(tmp_path, after_step=3) as metrics:
        metrics.log(4, {"train/loss": 40.0})
    assert [(r["step"], r["train/loss"]) for r in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


@pytest.mark.launch
def test_a_run_killed_between_writes_loses_none_of_them(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from bd3_scale.observe.loggers.base import LoggedRun
from bd3_scale.observe.loggers.run import RunLoggers
from bd3_scale.recipe.running import LoggingRecipe, WandbRecipe
metrics = RunLoggers(LoggedRun(Path(sys.argv[1]), "", {}), LoggingRecipe(wandb=WandbRecipe(mode="disabled")))
for step in range(1, 101):
    metrics.log(step, {"train/loss": 1.0})
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == -9
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 101))


DAMAGED = {
    "no JSON": b"not json",
    "a list": b"[1, 2]",
    "nothing": b"",
    "no step": b'{"train/loss": 1.0}',
    "a step that is null": b'{"step": null}',
    "a step that is text": b'{"step": "2"}',
    "a step that is true": b'{"step": true}',
    "a step below 0": b'{"step": -1}',
    "a step beyond all": b'{"step": %d}' % 2**63,
    "a loss that is text": b'{"step": 2, "train/loss": "low"}',
    "a loss in a list": b'{"step": 2, "eval/nelbo": [1.0]}',
    "not a number": b'{"step": 2, "train/loss": NaN}',
    "infinity": b'{"step": 2, "train/loss": 1e999}',
    "digits without end": b'{"step": 2, "train/loss": 1%s}' % (b"0" * 5000),
    "deep": b'{"step": 2, "train/loss": ' + b"[" * 100_000,
    "no UTF-8": b'{"step": 2, "\xff": 1}',
    "what a power cut leaves": bytes(4096) + b'{"step": 2}',
    "a kind that is none": b'{"step": 2, "kind": 3}',
    "an event among metrics": b'{"step": 2, "kind": "loss_spike", "train/loss": "ten"}',
    "an integer beyond all pictures": b'{"step": 2, "train/loss": 1%s}' % (b"0" * 301),
    "a line without end": b"x" * (LINE_LIMIT + 10),
    "JSON without end": b'{"step": 2, "x": "%s"}' % (b"x" * LINE_LIMIT),
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_set_aside_and_the_others_stay_as_they_are(tmp_path: Path, line: bytes, caplog) -> None:
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.damaged"
    before = b'{"step": 1, "train/loss": 1.50}\n' + line + b'\n{"step": 3, "train/loss":  2.5}\n{"step": 4}\n'
    path.write_bytes(before)
    assert [record["step"] for record in read_metrics(path)] == [1, 3, 4]
    assert path.read_bytes() == before, "who looks changes nothing"
    assert caplog.text.count(f"{path} has a damaged line, from line 2 on: left out here") == 1
    truncate_after(path, 3)
    assert path.read_bytes() == b'{"step": 1, "train/loss": 1.50}\n{"step": 3, "train/loss":  2.5}\n'
    assert aside.read_bytes() == before
    assert "line 2 on: dropped, and the file as it was is kept as metrics.jsonl.damaged" in caplog.text
    with path.open("ab") as file:
        file.write(line + b"\n")
    truncate_after(path, 1)
    assert path.read_bytes() == b'{"step": 1, "train/loss": 1.50}\n'
    assert aside.read_bytes() == before, "what was kept stays"
    assert aside.with_name("metrics.jsonl.damaged-2").read_bytes().endswith(line + b"\n")


def test_the_curve_of_a_damaged_file_is_drawn_and_it_is_told_once(tmp_path: Path, caplog) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "train/loss": 1.5}\n' + b"\n".join(DAMAGED.values()) + b'\n{"step": 3, "eval/nelbo": 1}\n'
    )
    for _ in range(2):
        loss_curve(path, tmp_path / "loss.png")
    assert caplog.text.count(f"{path} has {len(DAMAGED)} damaged lines, from line 2 on: left out") == 1


def test_an_event_may_hold_what_it_likes_but_has_a_step(tmp_path: Path) -> None:
    events = [{"step": 1, "kind": "loss_spike", "loss": "nan", "sample_ids": [1, 2]}, {"step": 2, "kind": "resumed"}]
    (tmp_path / "events.jsonl").write_text(
        '{"kind": "loss_spike"}\n{"step": 1}\n' + "".join(json.dumps(e) + "\n" for e in events)
    )
    assert read_metrics(tmp_path / "events.jsonl") == events
    assert last_event(tmp_path) == 1


def test_an_integer_of_many_digits_is_read_as_a_float_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "train/loss": {step * 10**299}}}\n' for step in (1, 2)))
    records = read_metrics(path)
    assert [(type(r["step"]), r["train/loss"], type(r["train/loss"])) for r in records] == [
        (int, 1e299, float),
        (int, 2e299, float),
    ]
    loss_curve(path, tmp_path / "loss.png")


def secret(path: Path) -> None:
    path.symlink_to(path.with_name("secret"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "make",
    [os.mkfifo, Path.mkdir, secret, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("gone")],
)
def test_what_is_no_file_is_moved_away_and_neither_waited_for_nor_followed(tmp_path: Path, make, caplog) -> None:
    (tmp_path / "secret").write_text("my key\n")
    path = tmp_path / "metrics.jsonl"
    make(path)
    assert read_metrics(path) == []
    with writer(tmp_path) as metrics:
        metrics.log(1, {"train/loss": 1.0})
    assert read_metrics(path) == [{"step": 1, "train/loss": 1.0}]
    assert not path.is_symlink()
    assert os.path.lexists(tmp_path / "metrics.jsonl.damaged")
    assert f"{path} is no regular file, and is moved to metrics.jsonl.damaged" in caplog.text
    assert (tmp_path / "secret").read_text() == "my key\n"
    assert sum("my key" in p.read_text() for p in tmp_path.iterdir() if p.is_file() and not p.is_symlink()) == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.write_bytes(b"../../x\xff")])
def test_an_id_of_wandb_that_is_none_is_drawn_anew(tmp_path: Path, make) -> None:
    make(tmp_path / "wandb_id")
    with writer(tmp_path, recipe=WandbRecipe(mode="offline")) as metrics:
        metrics.log(1, {"train/loss": 1.0})
    run_id = (tmp_path / "wandb_id").read_text()
    assert {p.stem for p in (tmp_path / "wandb").rglob("*.wandb")} == {f"run-{run_id}"}


@pytest.mark.timeout(120)
def test_wandb_offline_keeps_one_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for after_step in (0, 1):
            with writer(tmp_path, after_step, WandbRecipe(mode="auto")) as metrics:
                metrics.log(after_step + 1, {"train/loss": 1.0})
    run_id = (tmp_path / "wandb_id").read_text()
    assert len([*(tmp_path / "wandb").glob("offline-run-*")]) >= 1
    assert {p.stem for p in (tmp_path / "wandb").rglob("*.wandb")} == {f"run-{run_id}"}
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_wandb_disabled_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for recipe in (OFF, WandbRecipe(mode="auto")):
        with writer(tmp_path, recipe=recipe) as metrics:
            metrics.log(1, {"train/loss": 1.0})
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.timeout(120)
def test_a_wandb_failure_warns_once_and_the_metrics_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "no-such-mode")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with writer(tmp_path, recipe=WandbRecipe(mode="auto")) as metrics:
            metrics.log(1, {"train/loss": 1.0})
            metrics.log(2, {"train/loss": 1.0})
    assert sum("the logger wandb failed" in str(w.message) for w in caught) == 1
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_file_of_an_earlier_version_is_read_by_the_names_of_this_one_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((EARLIER / "metrics.jsonl").read_bytes())
    before = [json.loads(line) for line in path.read_text().splitlines()]
    told = read_metrics(path)
    assert [list(record.values()) for record in told] == [list(record.values()) for record in before]
    assert {key for record in told for key in record} == {
        "step",
        *(f"train/{name}" for name in ("loss", "grad_norm", "lr", "tokens")),
        *(f"eval/{name}" for name in ("nelbo", "nelbo_text_standard_error", "nelbo_noise_standard_error")),
        "eval/perplexity",
        "perf/tokens_per_second",
        "memory/peak_rss_bytes",
        *(f"checkpoint/{name}" for name in ("tries", "failed", "blocked_seconds", "seconds", "slowdown")),
    }
    # The evaluation after step 6 is dropped under its new name, since it is run again.
    with RunLoggers(LoggedRun(tmp_path, "", {}, 6, True), LoggingRecipe(wandb=OFF)) as metrics:
        metrics.log(7, {"train/loss": 4.5})
    assert [(r["step"], r["train/loss"]) for r in read_metrics(path) if "train/loss" in r][-2:] == [
        (6, 4.9187633991241455),
        (7, 4.5),
    ]
    assert read_nelbos(path) == {3: 6.036736020404492}
    assert path.read_text().startswith("".join(json.dumps(record) + "\n" for record in before[:7])), "kept as they were"


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        ("train_loss_block_8", "train/loss_block_8"),
        ("train_loss_source_web_block_2", "train/loss_source_web_block_2"),
        ("nelbo_block_8", "eval/nelbo_block_8"),
        ("nelbo_source_lr", "eval/nelbo_source_lr"),
        ("loss_variance_unclipped_block_4", "interval/loss_variance_unclipped_block_4"),
        ("mask_rate_low_block_4", "interval/mask_rate_low_block_4"),
        ("train/loss_block_8", "train/loss_block_8"),
        ("data/wait_seconds", "data/wait_seconds"),
        ("a plug-in's_block_3", "a plug-in's_block_3"),
    ],
)
def test_names_of_block_sizes_and_sources_are_renamed_by_their_start(tmp_path: Path, earlier: str, now: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, earlier: 2.5}) + "\n")
    assert read_metrics(path) == [{"step": 1, now: 2.5}]
