"""Bring manifests of earlier formats up to date; no other module knows these formats.

| format | what it holds |
|---|---|
| 3 | `recipe`: the whole recipe of a run, or of an import, which every reader had to validate |
| 4 | what readers of weights need, as fields of the manifest; the recipe of a run, unvalidated: `trained_with` |

A new format needs a line in this table, its number in `FORMAT`, and a function in `_UPGRADES` that makes it from the
format before. A recipe option that is removed or renamed needs no new format: a resume reports the options that it does
not know. If the option's meaning must survive, the function translates it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

FORMAT: Literal[4] = 4
OLDEST = 3


def up_to_date(content: Any) -> Any:
    """Return the content of a manifest of any format from `OLDEST` on in the form that this version writes.

    Incomplete content, or content that is no manifest at all, is returned as far as it goes: the validation that
    follows reports what is missing.
    """
    while isinstance(content, dict) and content.get("format") in _UPGRADES:
        content = _UPGRADES[content["format"]](content)
    return content


def _to_4(content: dict[str, Any]) -> dict[str, Any]:
    """Convert format 3.

    It had one `recipe`: for a run the whole recipe, for an import the model's sections and its source.
    """
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
        # Format 3 knew three objectives; next_token is the only one whose model fills no masks.
        "fills_masks": diffusion.get("objective") != "next_token",
        "trained_with": None if imported else recipe,
    }
    source = {key: recipe[key] for key in ("imported_from", "source_fingerprint") if key in recipe}
    return content | known | source


def _section(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    section = recipe.get(name)
    return section if isinstance(section, dict) else {}


_UPGRADES: dict[Any, Callable[[dict[str, Any]], dict[str, Any]]] = {3: _to_4}
