"""Make folders of runs as training leaves them, without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def train_record(step: int, **more: float | None) -> dict[str, Any]:
    return {
        "step": step,
        "train/loss": 4 + 5 * math.exp(-step / 40) + 0.1 * math.sin(step),
        "train/grad_norm": 1 + 1 / step,
        "train/lr": 1e-3 * min(1, step / 10),
        "train/tokens": 2048 * step,
        "train/loss_block_4": 4.0,
        "train/loss_block_16": 5.0,
        "perf/tokens_per_second": 8000.0 + step,
        "perf/step_seconds": 0.25,
        "perf/mfu": 0.41,
        "memory/peak_rss_bytes": 1.5 * 2**30,
        "data/wait_seconds": 0.001,
        "experts/max_over_mean": 1.5,
        "experts/dead": 0,
        **more,
    }


def evaluation_record(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "eval/nelbo": 6 - step / 100,
        "eval/nelbo_text_standard_error": 0.3,
        "eval/nelbo_noise_standard_error": 0.4,
        "eval/perplexity": 400.0,
        "eval/nelbo_block_4": 5.5,
        "interval/mask_rate_low_block_4": 0.3,
        "interval/mask_rate_high_block_4": 0.8,
        "interval/loss_variance_block_4": 2.0,
        "interval/loss_variance_unclipped_block_4": 9.0,
    }


def make_run(folder: Path, name: str = "tiny", steps: int = 100, **recipe: str) -> Path:
    """Make a whole run: metrics, an event, samples, two starts and a recipe."""
    folder.mkdir(parents=True)
    text = (REPOSITORY / "recipes/quickstart.yaml").read_text()
    text = text.replace("name: quickstart", f"name: {json.dumps(name)}").replace("steps: 840", f"steps: {steps}")
    for old, new in recipe.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "recipe.yaml").write_text(text)
    records = [train_record(step) for step in range(1, steps + 1)]
    saved = {
        "checkpoint/tries": 1,
        "checkpoint/failed": 0,
        "checkpoint/seconds": 0.2,
        "checkpoint/blocked_seconds": 0.1,
    }
    for step in (steps // 2, steps):
        records += [{"step": step, **saved}, evaluation_record(step)]
    write_lines(folder / "metrics.jsonl", sorted(records, key=lambda record: record["step"]))
    spike = {"step": steps // 3, "kind": "loss_spike", "loss": "9.5", "grad_norm": "3.25", "median": 4.5, "seed": 1}
    resumed = {"step": steps // 2, "kind": "resumed", "changes": {"optimizer.lr": {"before": 1e-3, "now": 2e-3}}}
    write_lines(folder / "events.jsonl", [spike, {**resumed, "notes": ["the data moved"]}])
    samples = [
        {"step": step, "kind": "sample", "prompt": "def f(", "text": f"x): return {step}", "nfe": 9}
        for step in (steps // 2, steps)
    ]
    write_lines(folder / "samples.jsonl", samples)
    for number, first in enumerate((0, steps // 2)):
        start = {
            "attempt": number,
            "began": f"2026-01-0{number + 1}T10:00:00+00:00",
            "from_step": first,
            "command": "bd3-scale train recipes/tiny.yaml",
            "hosts": ["node-a", "node-b"],
            "world_size": 2,
            "cpu": "A CPU",
            "cpu_cores": 8,
            "gpus": [],
            "versions": {"bd3_scale": "0.2.0", "torch": "2.13.0"},
            "commit": "abc123",
            "clean": False,
        }
        path = folder / f"attempts/{number:04d}/environment.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(start))
    return folder
