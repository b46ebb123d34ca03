"""The metrics file of whole, killed and resumed runs, and Weights & Biases writing for real, offline."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bd3_scale.observe.metrics import MetricsWriter, read_metrics, truncate_after
from bd3_scale.recipe.schema import WandbRecipe

OFF = WandbRecipe(mode="disabled")


def writer(run_dir: Path, after_step: int = 0, recipe: WandbRecipe = OFF) -> MetricsWriter:
    return MetricsWriter(run_dir, recipe, after_step=after_step, name="tiny", config={"seed": 1})


def test_records_are_strict_json_lines_readable_before_the_end(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.write(1, train_loss=2.5, note="first")
        metrics.write(2, train_loss=math.nan, learning_rate=math.inf)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 1, "train_loss": 2.5, "note": "first"},
        {"step": 2, "train_loss": None, "learning_rate": None},
    ]


def test_resuming_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with writer(tmp_path) as metrics:
        for step in range(1, 6):
            metrics.write(step, train_loss=float(step))
        metrics.write(5, nelbo=3.0)
    with path.open("a") as file:
        file.write('{"step": 6, "train_lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5, 5]
    with writer(tmp_path, after_step=3) as metrics:
        metrics.write(4, train_loss=40.0)
    assert [(r["step"], r["train_loss"]) for r in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


@pytest.mark.launch
def test_a_run_killed_between_writes_loses_none_of_them(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from bd3_scale.observe.metrics import MetricsWriter
from bd3_scale.recipe.schema import WandbRecipe
metrics = MetricsWriter(Path(sys.argv[1]), WandbRecipe(mode="disabled"), after_step=0, name="", config={})
for step in range(1, 101):
    metrics.write(step, train_loss=1.0)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == -9
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 101))


@pytest.mark.parametrize("spoilt", ["not json", "[1, 2]", ""])
def test_a_spoilt_line_is_named_and_nothing_is_dropped(tmp_path: Path, spoilt: str) -> None:
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step": 1}}\n{spoilt}\n{{"step": 3}}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        truncate_after(path, 1)
    assert path.read_text() == text


@pytest.mark.timeout(120)
def test_wandb_offline_keeps_one_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for after_step in (0, 1):
            with writer(tmp_path, after_step, WandbRecipe(mode="auto")) as metrics:
                metrics.write(after_step + 1, train_loss=1.0)
    run_id = (tmp_path / "wandb_id").read_text()
    assert len([*(tmp_path / "wandb").glob("offline-run-*")]) >= 1
    assert {p.stem for p in (tmp_path / "wandb").rglob("*.wandb")} == {f"run-{run_id}"}
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_wandb_disabled_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for recipe in (OFF, WandbRecipe(mode="auto")):
        with writer(tmp_path, recipe=recipe) as metrics:
            metrics.write(1, train_loss=1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.timeout(120)
def test_a_wandb_failure_warns_once_and_the_metrics_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "no-such-mode")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with writer(tmp_path, recipe=WandbRecipe(mode="auto")) as metrics:
            metrics.write(1, train_loss=1.0)
            metrics.write(2, train_loss=1.0)
    assert sum("Weights & Biases failed" in str(w.message) for w in caught) == 1
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
