"""Check the load of experts, as numbers and as a picture."""

from __future__ import annotations

import json

import numpy as np
from matplotlib.image import imread

from bd3_scale.observe.experts import ExpertLoad, load_metrics

# Two layers, the first of them number 3, of four experts; the last has no clean rows.
COUNTS = np.array([[[4, 0, 0, 0], [1, 1, 1, 1]], [[2, 2, 1, 3], [0, 0, 0, 0]]])


def test_metrics_tell_largest_over_mean_and_the_dead():
    found = load_metrics(COUNTS, 3)
    assert found == {
        "experts/max_over_mean": 5 / 2,
        "experts/dead": 0,
        "experts/layer_3_noisy_max_over_mean": 4,
        "experts/layer_3_noisy_dead": 3,
        "experts/layer_3_clean_max_over_mean": 1,
        "experts/layer_3_clean_dead": 0,
        "experts/layer_4_noisy_max_over_mean": 1.5,
        "experts/layer_4_noisy_dead": 0,
    }


def test_the_last_steps_are_kept_and_drawn(tmp_path):
    load = ExpertLoad(tmp_path, 3)
    load.write()
    assert not list(tmp_path.iterdir())
    for step in range(1, 131):
        load.add(step, COUNTS * (step > 30))
    load.write()
    record = json.loads((tmp_path / "experts.json").read_text())
    assert record["steps"] == [31, 130]
    assert record["first_layer"] == 3
    assert record["noisy"] == (100 * COUNTS[:, 0]).tolist()
    assert record["clean"] == (100 * COUNTS[:, 1]).tolist()
    image = imread(tmp_path / "experts.png")
    # Experts that are four times as busy as the mean, and dead ones.
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 10


def test_the_panels_are_of_streams_that_have_rows(tmp_path):
    for name, counts in (("both", COUNTS), ("noisy", COUNTS * [[[1], [0]]])):
        load = ExpertLoad(tmp_path, 0)
        load.add(1, counts)
        load.write()
        (tmp_path / "experts.png").rename(tmp_path / f"{name}.png")
    assert imread(tmp_path / "both.png").shape[0] > 1.5 * imread(tmp_path / "noisy.png").shape[0]
