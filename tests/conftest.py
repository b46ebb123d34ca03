"""One process group of one process for the tests that need a model in this process."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def groups():
    from bd3_scale.parallel.groups import process_groups
    from bd3_scale.recipe.schema import ParallelRecipe

    with process_groups(ParallelRecipe()) as opened:
        yield opened
