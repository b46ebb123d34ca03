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


@pytest.fixture(scope="session")
def token_nll():
    """What a model gives for the clean tokens at `rows`, indices into the flattened [B, L], of a two-stream forward."""
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


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and PyTorch finds none here")
