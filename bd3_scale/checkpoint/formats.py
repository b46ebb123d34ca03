"""Formats of the manifest: what earlier versions wrote is brought up to date here, and nowhere else.

| format | |
|---|---|
| 3 | the recipe of a run, or of an import, typed whole: `recipe` |
| 4 | what readers of weights need, by itself; the recipe of a run kept as it was: `trained_with` |

A new format has a line in this table, its number in `FORMAT`, and the way to it from the one before in `_NEXT`. An
option of the recipe that goes or gets another name needs none: a resume tells those that it does not know. One whose
meaning must outlive its name is given its new one here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

FORMAT: Literal[4] = 4
OLDEST = 3


def up_to_date(content: Any) -> Any:
    """Return the content of a manifest of any format from `OLDEST` on as this version would have written it.

    Of what is no manifest at all, or lacks something, as much is returned as there is: who validates it says so.
    """
    while isinstance(content, dict) and content.get("format") in _NEXT:
        content = _NEXT[content["format"]](content)
    return content


def _to_4(content: dict[str, Any]) -> dict[str, Any]:
    """Format 3 had one `recipe`: of a run the whole of it, of an import the model's sections and its source."""
    content = {**content, "format": 4}
    recipe = content.pop("recipe", None)
    if not isinstance(recipe, dict):
        return content
    diffusion, data, train = (_section(recipe, name) for name in ("diffusion", "data", "train"))
    imported = "imported_from" in recipe
    precision = recipe.get("precision") if imported else train.get("precision")
    known = {
        "name": recipe.get("name"),
        "model": recipe.get("model"),
        "precision": "bf16" if precision == "bf16" else "fp32",
        "max_position_embeddings": recipe.get("max_position_embeddings") if imported else data.get("seq_len"),
        "objective": diffusion.get("objective", "block_diffusion"),
        "block_size": diffusion.get("block_size"),
        # Of the three that there were, one masks nothing.
        "fills_masks": diffusion.get("objective") != "next_token",
        "trained_with": None if imported else recipe,
    }
    source = {key: recipe[key] for key in ("imported_from", "source_fingerprint") if key in recipe}
    return content | known | source


def _section(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    section = recipe.get(name)
    return section if isinstance(section, dict) else {}


_NEXT: dict[Any, Callable[[dict[str, Any]], dict[str, Any]]] = {3: _to_4}
