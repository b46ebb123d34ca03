"""Check that a run keeps the order of its data when its cache and the recipe's default change."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bd3_scale.data import split_writer
from bd3_scale.data.cache import MIN_DEFAULT_WINDOW
from bd3_scale.data.order import WindowOrder
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from tests.support import forks
from tests.support.recipes import write_recipe, write_topics
from tests.support.runs import losses

OPTIONS = ["data.remote=data", "data.path=cache", "train.steps=6", "checkpoint.every_steps=3"]
OPTIONS += ["optimizer.schedule=constant"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make a recipe, and data of many small shards."""
    folder = tmp_path_factory.mktemp("order")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_writer, "SHARD_BYTES", 1 << 13)
        texts = write_topics(folder / "texts")
        prepare([texts], folder / "data", load_tokenizer("bytes"), 64, holdout=0.1, workers=1, progress=False)
    write_recipe(folder / "recipe.yaml")
    return folder


def train(place, name, *options, returncode=0):
    command = [forks.BD3_SCALE, "train", "recipe.yaml", f"run_dir={name}", *OPTIONS, *options]
    done = forks.run(command, cwd=place)
    assert done.returncode == returncode, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


def order_of(run, step):
    return json.loads((run / f"checkpoints/step-{step:08d}/manifest.json").read_text())["data_order"]


def test_a_run_keeps_its_order(place):
    shards = json.loads((place / "data/train/index.json").read_text())["shards"]
    counts = np.array([shard["samples"] for shard in shards])
    orders = [
        WindowOrder(counts, 8, np.arange(8), shuffle_window=window, seed=1) for window in (64, MIN_DEFAULT_WINDOW)
    ]
    assert orders[0].at(4).ids.tolist() != orders[1].at(4).ids.tolist()
    train(place, "whole", "data.shuffle_window=64")
    train(place, "parts", "data.shuffle_window=64", "train.steps=3")
    assert order_of(place / "parts", 3) == {"version": 2, "shuffle_window": 64}
    said = train(place, "parts", "data.shuffle_window=128", returncode=2)
    assert "data.shuffle_window is 128, the checkpoint has 64" in said
    # The run's own window fits in the cache; a new run's would not.
    said = train(place, "parts", "data.cache_limit=200kb")
    assert "(data.shuffle_window=64, 8 of 8 parts) of data" in said
    assert order_of(place / "parts", 6) == order_of(place / "whole", 6)
    assert losses(place / "parts") == losses(place / "whole")
    # No checkpoint is before this step, so the order comes from later ones.
    assert json.loads(forks.bd3_scale("replay", "parts", "--step", 2, cwd=place))["same"] is True


def test_a_cache_that_is_too_small_is_refused_before_work(place):
    said = train(place, "refused", "data.cache_limit=200kb", returncode=2)
    assert "data.cache_limit=200kb is too small" in said
    window = said.split("data.shuffle_window=")[-1].split()[0]
    assert losses(place / "refused") == {}
    train(place, "refused", "data.cache_limit=200kb", f"data.shuffle_window={window}")
