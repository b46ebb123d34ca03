"""Check that the table of predictions has what `bd3-scale plan` says of the same recipe."""

from __future__ import annotations

import json

import pytest

from tests.support import forks
from tools.bench_plan import RECIPES, main


@pytest.mark.slow
def test_a_row_is_what_the_command_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "paper-110m"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    cells = line.strip("| ").split(" | ")
    words = ["plan", "paper-110m.yaml", "--gpus", "16", "--vocabulary", "50258", "--json"]
    told = json.loads(forks.bd3_scale(*words, cwd=RECIPES))
    assert cells[:3] == ["paper-110m", "16 H100", told["layout"]]
    assert float(cells[3].split(" of ")[0]) == pytest.approx(
        max(r["card_bytes"] for r in told["ranks"]) / 1e9, abs=0.06
    )
    assert float(cells[4]) == pytest.approx(told["step_seconds"], rel=0.01)
    assert cells[5] == f"{told['mfu']:.1%}"
    # Only data-parallel ranks send messages in this recipe, at the end of a step.
    assert float(cells[6].rstrip("%")) <= float(cells[5].rstrip("%"))
