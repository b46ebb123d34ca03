"""One process group of one process for the tests that need a model in this process; GPU tests where there is a GPU."""

from __future__ import annotations

import os

import pytest

# It would run in place of the backends that the tests compare.
os.environ.pop("BD3_SCALE_ATTENTION", None)


@pytest.fixture(scope="module")
def groups():
    from bd3_scale.parallel.groups import process_groups
    from bd3_scale.recipe.schema import ParallelRecipe

    with process_groups(ParallelRecipe()) as opened:
        yield opened


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and PyTorch finds none here")
