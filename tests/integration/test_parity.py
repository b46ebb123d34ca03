"""Compare every parallel layout with one process of plain PyTorch: same weights, a few steps, fp32, 1e-5.

`make test` runs the layouts marked `core` in cases.py, `make test-all` all of them; parity.py prints them as a table.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import cases
from tests.integration.oracle import Oracle
from tests.integration.parity import TOLERANCE, measure


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


@pytest.mark.parametrize(
    "name",
    [name if layout.core else pytest.param(name, marks=pytest.mark.slow) for name, layout in cases.LAYOUTS.items()],
)
def test_steps_are_those_of_one_process(name: str, oracle: Oracle, tmp_path: Path) -> None:
    found = measure(name, oracle, tmp_path)
    assert found["difference"] <= TOLERANCE, found


def test_the_matrix_holds_what_it_promises() -> None:
    layouts = cases.LAYOUTS.values()
    assert len(layouts) >= 24
    assert {1, 2, 4, 8} <= {layout.world_size for layout in layouts}
    assert {layout.case for layout in layouts} == cases.CASES.keys()
    assert {layout.optimizer for layout in layouts if layout.core} == cases.OPTIMIZERS.keys()
    assert 10 <= sum(layout.core for layout in layouts) <= 20
