"""Check that the loss curve is a picture that can be opened, whatever a run recorded."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from bd3_scale.observe.plot import loss_curve

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def picture(tmp_path: Path, records: list[dict[str, object]]) -> np.ndarray:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    loss_curve(metrics, tmp_path / "loss.png")
    return (imread(tmp_path / "loss.png")[..., :3] * 255).round().astype(int)


def pixels(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((image == colour).all(-1).sum())


def test_both_curves_are_drawn(tmp_path: Path) -> None:
    generator = random.Random(0)
    train: list[dict[str, object]] = [
        {"step": s, "train/loss": 8 * 0.99**s + 3 + generator.gauss(0, 0.3)} for s in range(1, 400)
    ]
    without = picture(tmp_path, train)
    held_out: list[dict[str, object]] = [{"step": s, "eval/nelbo": 8 * 0.99**s + 3.2} for s in range(50, 400, 50)]
    image = picture(tmp_path, train + held_out)
    assert image.shape == (675, 1200, 3)
    assert pixels(image, BLUE) > 500
    assert pixels(without, ORANGE) == 0
    assert pixels(image, ORANGE) > 200


def test_an_outlier_and_a_lost_loss_leave_the_curve_in_view(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"step": s, "train/loss": 5 - s / 100} for s in range(1, 300)]
    records[150]["train/loss"] = 1e6
    records[20]["train/loss"] = None
    flat = picture(tmp_path, records)
    rows = (flat == BLUE).all(-1).any(1).nonzero()[0]
    assert rows.max() - rows.min() > 300


def test_a_single_step_is_a_picture_and_none_is_refused(tmp_path: Path) -> None:
    assert picture(tmp_path, [{"step": 1, "train/loss": 3.0}]).any()
    with pytest.raises(ValueError, match="no training loss"):
        picture(tmp_path, [{"step": 1, "eval/nelbo": 3.0}])
