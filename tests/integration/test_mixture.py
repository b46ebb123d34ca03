"""Run on several data sets: check what runs read, resume, print and refuse."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest
import yaml

from bd3_scale.convert.calibration import calibration_batches
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.mixture import NodeMixture, source_key
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.recipe.schema import DataRecipe
from tests.support import forks
from tests.support.recipes import tiny_recipe, write_topics
from tests.support.runs import losses, records

SOURCES = [{"name": name, "path": name} for name in ("web", "code", "math")]
STAGES = [{"until": 4, "weights": {"web": 0.75, "code": 0.25}}, {"weights": {"web": 0.5, "math": 0.5}}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make three data sets of parts of the same documents, and a recipe that mixes them."""
    folder = tmp_path_factory.mktemp("mixture")
    texts = sorted(write_topics(folder / "texts").iterdir())
    for number, source in enumerate(SOURCES):
        prepare(
            texts[number::3],
            folder / source["path"],
            load_tokenizer("bytes"),
            64,
            holdout=0.2 if number < 2 else 0,
            workers=1,
            progress=False,
        )
    write(folder, "recipe.yaml")
    return folder


def write(folder, name, stages=STAGES, sources=SOURCES, **sections):
    made = tiny_recipe(optimizer={"schedule": "constant"}, **sections)
    made["data"] = {"seq_len": 64, "num_workers": 0, "shuffle_window": 64, "sources": sources, "stages": stages}
    (folder / name).write_text(yaml.safe_dump(made))


def train(place, run, *options, recipe="recipe.yaml", returncode=0):
    done = forks.run([forks.BD3_SCALE, "train", recipe, f"run_dir={run}", *options], cwd=place)
    assert done.returncode == returncode, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


@pytest.fixture(scope="module")
def whole(place):
    said = train(place, "whole", "train.steps=8", "evaluation.every_steps=4", "evaluation.draws=2")
    return said, place / "whole"


def test_losses_and_bounds_are_told_by_source(whole):
    said, run = whole
    mixture = DataRecipe.model_validate({"seq_len": 64, "sources": SOURCES, "stages": STAGES}).mixture
    nodes = [NodeMixture(mixture, ("web", "code", "math"), 8, node) for node in range(8)]
    steps = [record for record in records(run) if "train/loss" in record]
    for record in steps:
        mixed = ("web", "code") if record["step"] <= 4 else ("web", "math")
        told = {key.removeprefix("train/loss_source_"): value for key, value in record.items() if "_source_" in key}
        assert set(told) == set(mixed)
        taken = sum(node.taken(record["step"]) - node.taken(record["step"] - 1) for node in nodes)
        shares = dict(zip(("web", "code", "math"), taken / 8, strict=True))
        together = sum(told[name] * shares[name] for name in mixed)
        assert together == pytest.approx(record["train/loss"], rel=1e-6)
    measured = [record for record in records(run) if "eval/nelbo" in record]
    assert [record["step"] for record in measured] == [4, 8]
    for record in measured:
        assert {key for key in record if key.startswith("eval/nelbo_source_")} == {
            "eval/nelbo_source_web",
            "eval/nelbo_source_code",
        }
        low, high = sorted((record["eval/nelbo_source_web"], record["eval/nelbo_source_code"]))
        assert low < record["eval/nelbo"] < high
    assert re.search(r"step 8: by source web \d+\.\d+, code \d+\.\d+", said)


def test_a_run_goes_on_on_more_ranks_and_with_other_stages_to_come(place, whole):
    train(place, "parts", "train.steps=3")
    later = [*STAGES[:1], {"until": 8, "weights": STAGES[1]["weights"]}, {"weights": {"code": 1}}]
    # A source that no step has read may be added or removed.
    write(place, "later.yaml", later, [*SOURCES, {"name": "new", "path": "math"}])
    train(place, "parts", "train.steps=8", "launch.processes=2", recipe="later.yaml")
    alone, parts = losses(whole[1]), losses(place / "parts")
    assert {step: parts[step] for step in (1, 2, 3)} == {step: alone[step] for step in (1, 2, 3)}
    assert {step: pytest.approx(values, rel=1e-5) for step, values in alone.items()} == parts
    write(place, "other.yaml", [{"until": 4, "weights": {"web": 0.7, "code": 0.3}}, STAGES[1]])
    said = train(place, "parts", "train.steps=9", recipe="other.yaml", returncode=2)
    assert "data.stages: the first 8 steps are {'code': 0.3, 'web': 0.7} until 4" in said


def test_a_run_is_measured_and_replayed(place, whole):
    (recorded,) = [record for record in records(whole[1]) if record["step"] == 8 and "eval/nelbo" in record]
    found = json.loads(forks.bd3_scale("evaluate", "whole", "--draws", 2, "--json", cwd=place))
    assert {one["text"]: one["nelbo"] for one in found} == {
        name: pytest.approx(recorded[f"eval/nelbo_source_{name}"], rel=1e-5) for name in ("web", "code")
    }
    assert all(one["own"] for one in found)
    (of_code,) = json.loads(forks.bd3_scale("evaluate", "whole", "--data", "code", "--draws", 2, "--json", cwd=place))
    assert of_code == found[1] | {"text": "held-out"}
    assert forks.bd3_scale("generate", "whole", "--prompt", "The ", "--max-new-tokens", 8, cwd=place)
    replayed = json.loads(forks.bd3_scale("replay", "whole", "--step", 6, cwd=place))
    assert replayed["same"] is True
    keys = replayed["keys"]
    assert len(keys["sources"]) == len(keys["epochs"]) == len(keys["sample_ids"]) == 8
    assert set(keys["sources"]) == {"web", "math"}


@pytest.mark.slow
def test_a_run_is_quantised_on_what_it_was_trained_on(place, whole):
    (recorded,) = [record for record in records(whole[1]) if record["step"] == 8 and "eval/nelbo" in record]
    how = ("--bits", 4, "--group-size", 16, "--draws", 2, "--calibration-sequences", 8)
    report = json.loads(forks.bd3_scale("convert", "quantize", "whole", "--out", "small", *how, "--json", cwd=place))
    # Both figures are over all held-out sets, in bf16.
    assert report["before"]["nelbo"] == pytest.approx(recorded["eval/nelbo"], rel=2e-3)
    assert report["evaluation_sequences"] == sum(
        load_manifest(place / name).validation.sequences for name in ("web", "code")
    )


def test_a_model_is_calibrated_on_the_shares_that_it_was_trained_on(place):
    sources = [{**source, "path": str(place / source["path"])} for source in SOURCES]
    data = DataRecipe.model_validate({"seq_len": 64, "sources": sources, "stages": STAGES})
    assert data.as_mixed_before(0) == data
    data = data.as_mixed_before(8)
    assert data.stages[0].weights == {"web": 5, "code": 1, "math": 2}
    batches = calibration_batches(data, 64)
    taken = Counter(key for batch in batches for key in batch.source_keys.tolist())
    counts = [taken[source_key(name)] for name in ("web", "code", "math")]
    assert sum(counts) == 64
    assert np.allclose(counts, [40, 8, 16], atol=3)


def test_what_does_not_go_together_is_refused(place):
    prepare([place / "texts"], place / "short", load_tokenizer("bytes"), 32, holdout=0, workers=1, progress=False)
    once = [{**SOURCES[0]}, {**SOURCES[1], "max_epochs": 0.05}]
    for name, stages, sources, words in (
        (
            "short",
            [{"weights": {"a": 1}}],
            [{"name": "a", "path": "web"}, {"name": "b", "path": "short"}],
            "b does not fit a: its sequences have 32 tokens, there 64",
        ),
        ("often", [{"weights": {"web": 0.1, "code": 0.9}}], once, "code would be seen"),
        (
            "unknown",
            [{"weights": {"news": 1}}],
            SOURCES,
            "data.stages.0.weights.news: is no source; they are web, code, math",
        ),
        ("ends", [STAGES[1], STAGES[0]], SOURCES, "`until` is none, 4"),
    ):
        write(place, f"{name}.yaml", stages, sources)
        assert words in train(place, name, recipe=f"{name}.yaml", returncode=2)


def test_the_mixture_is_shown_before(place):
    told = json.loads(forks.bd3_scale("data", "mixture", "recipe.yaml", "train.steps=8", "--json", cwd=place))
    assert [(stage["first_step"], stage["last_step"]) for stage in told] == [(1, 4), (5, 8)]
    counts = [{name: use["sequences"] for name, use in stage["sources"].items()} for stage in told]
    assert counts == [{"web": 24, "code": 8, "math": 0}, {"web": 16, "code": 0, "math": 16}]
    table = forks.bd3_scale("data", "mixture", "recipe.yaml", cwd=place)
    assert "75.0%" in table
