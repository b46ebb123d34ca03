"""Check that runs of earlier versions resume, evaluate and generate as they did then.

`tests/fixtures/format-3` is a run of six steps with its data, as written on 2026-11-29; `expected.json` has the
results of that version. Never change these folders.
"""

from __future__ import annotations

import json
import shutil

import pytest

from tests.conftest import TESTS
from tests.support import forks
from tests.support.runs import losses

CHECKPOINT = "run/checkpoints/step-00000006"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier") / "format-3"
    shutil.copytree(TESTS / "fixtures" / "format-3", folder)
    return folder


@pytest.fixture(scope="module")
def expected(earlier):
    return json.loads((earlier / "expected.json").read_text())


def test_a_run_of_format_3_is_measured_as_then(earlier, expected):
    for block_size, nelbo in expected["nelbo"].items():
        options = ["--json", "--draws", 2, "--block-size", block_size]
        (found,) = json.loads(forks.bd3_scale("evaluate", CHECKPOINT, *options, cwd=earlier))
        assert found["nelbo"] == pytest.approx(nelbo, rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"][block_size], rel=1e-5)


def test_a_run_of_format_3_generates_as_then(earlier, expected):
    for temperature, unmasking in ((0, "static"), (1, "first-hitting")):
        options = ["--prompt", "The ", "--max-new-tokens", 24, "--unmasking", unmasking, "--temperature", temperature]
        written = json.loads(forks.bd3_scale("generate", CHECKPOINT, *options, "--json", cwd=earlier))
        assert written["tokens"] == expected[f"text_at_temperature_{temperature}"]


def test_a_run_of_format_3_goes_on_as_then(earlier, expected, tmp_path):
    from bd3_scale.data.manifest import data_hash, load_manifest

    shutil.copytree(earlier, tmp_path / "run")
    told = forks.run([forks.BD3_SCALE, "train", "recipe.yaml"], cwd=tmp_path / "run")
    then = {int(step): pytest.approx(tuple(values), rel=1e-5) for step, values in expected["losses"].items()}
    assert losses(tmp_path / "run" / "run") == then
    assert "step-00000006 knows its data by the hash of an earlier version" in told.stdout + told.stderr
    checkpoints = earlier / CHECKPOINT, tmp_path / "run/run/checkpoints/step-00000009"
    before, after = (json.loads((folder / "manifest.json").read_text()) for folder in checkpoints)
    assert before["data_hash"] != after["data_hash"] == data_hash(load_manifest(tmp_path / "run" / "data"))
    assert "data_order" not in after


def test_the_hash_of_a_tokeniser_is_what_it_was(earlier):
    from bd3_scale.data.tokenizer import load_tokenizer

    recorded = json.loads((earlier / "data" / "manifest.json").read_text())["tokenizer_hash"]
    assert load_tokenizer(earlier / "data").hash == recorded == load_tokenizer("bytes").hash
