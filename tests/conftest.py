"""Choose which tests run where and in what order, and share fixtures among several folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

TESTS = Path(__file__).parent
CHROMIUM = Path("/usr/bin/chromium")
# Their tests start runs or interpreters. The longest come first, so that no worker begins one at the end.
LAUNCHING = ("integration", "reproduction", "tools", "examples", "faults", "slurm")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # each worker has a core; two threads each would wait for one another
# No deadline: the time of an example shows how busy the machine is.
hypothesis.settings.register_profile("bd3_scale", deadline=None)
hypothesis.settings.load_profile("bd3_scale")
# It would replace the backends that the tests compare.
os.environ.pop("BD3_SCALE_ATTENTION", None)


@pytest.fixture(scope="module")
def groups():
    from bd3_scale.parallel.groups import process_groups
    from bd3_scale.recipe.schema import ParallelRecipe

    with process_groups(ParallelRecipe()) as opened:
        yield opened


@pytest.fixture(scope="module")
def random_model(groups):
    """Return a function that builds a model of random weights: `random_model(vocabulary, seed=…)` and its shape."""
    import torch

    from bd3_scale.model.build import build_model
    from bd3_scale.recipe.schema import ModelRecipe

    def build(vocabulary, *, seed=1, num_layers=2, hidden_size=32, init_std=0.3):
        shape = {"num_layers": num_layers, "hidden_size": hidden_size, "num_attention_heads": 2}
        recipe = ModelRecipe(**shape, ffn_hidden_size=hidden_size, init_std=init_std)
        cpu = torch.device("cpu")
        (model,) = build_model(recipe, vocabulary, groups, dtype=torch.float32, device=cpu, seed=seed)
        return model.requires_grad_(False).eval()

    return build


@pytest.fixture(scope="session")
def token_nll():
    """Return a function that computes a two-stream forward's nll of clean tokens at `rows`, indices into the flattened
    [B, L]."""
    import torch

    from bd3_scale.model.rows import ModelInputs

    def compute(model, noisy, clean, positions, spans, rows):
        sequence, position = rows // clean.shape[1], rows % clean.shape[1]
        inputs = ModelInputs(
            tokens=torch.cat([noisy, clean], 1),
            positions=positions,
            spans=spans,
            num_noisy=1,
            head_rows=position * len(clean) + sequence,
            targets=clean[sequence, position],
            weights=torch.ones(len(rows)),
            noisy_pairs=0,
            clean_pairs=0,
        )
        return model(inputs)[1]

    return compute


@pytest.fixture(scope="session")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare `write_topics` as bytes, 64 a sequence; it is made once for all workers, and only to be read."""
    from filelock import FileLock

    from tests.support import forks
    from tests.support.recipes import write_topics

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    data = shared / "topics" / "data"
    with FileLock(shared / "topics.lock"):
        if not data.exists():
            write_topics(data.parent / "text")
            options = ["--tokenizer", "bytes", "--seq-len", 64, "--holdout", 0.1, "--out", "data"]
            forks.bd3_scale("data", "prepare", "text", *options, cwd=data.parent)
    return data


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folders = {item: item.path.relative_to(TESTS).parts[0] for item in items}
    items.sort(key=lambda item: LAUNCHING.index(folders[item]) if folders[item] in LAUNCHING else len(LAUNCHING))
    for item in items:
        if folders[item] in LAUNCHING:
            item.add_marker(pytest.mark.launch)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and PyTorch finds none here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start a headless Chromium for the tests of a module; without one they are skipped, or fail where CI is set."""
    from playwright.sync_api import expect, sync_playwright

    from tests.support.missing import unavailable

    if not CHROMIUM.exists():
        unavailable(f"needs {CHROMIUM} (apt-get install chromium)")
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()
