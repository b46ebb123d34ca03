"""Check that recipes state the predicted memory and speed; `python tools/recipe_comments.py` renews them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_scale.plan import fake_gpu
from tools.recipe_comments import RECIPES, has_comments, renewed

COMMENTED = sorted(filter(has_comments, RECIPES.glob("*.yaml")))
QUICK = "paper-110m"


@pytest.mark.launch
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem != QUICK else ()) for path in COMMENTED],
    ids=lambda path: path.stem,
)
def test_comments_are_what_is_predicted(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fake_gpu.obstacle() is None
    # Results in the cache are of earlier code, so the cache is emptied; the fake GPU's library is built again, too.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert renewed(path) == path.read_text()


def test_the_quick_one_is_there() -> None:
    assert {path.stem for path in COMMENTED} == {QUICK, "1b", "3b", "8b", "32b", "16b-a1b", "30b-a3b"}
