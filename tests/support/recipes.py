"""Write the tiny recipe that tests train, and the text that they train on."""

from __future__ import annotations

import copy
import pydoc_data.topics
from pathlib import Path
from typing import Any

import yaml

_TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
    },
    "diffusion": {"block_size": 8, "mask_rate_low": 0.3, "mask_rate_high": 0.8},
    "data": {"path": "data", "seq_len": 64, "num_workers": 0},  # a start is a second faster than with loader workers
    "optimizer": {"lr": 1e-3, "ema_decay": 0.9},
    "train": {"steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
    "logging": {"wandb": {"mode": "disabled"}},
}


def tiny_recipe(**sections: Any) -> dict[str, Any]:
    """Return a recipe as a file holds it; arguments replace its values, in sections key by key."""
    recipe = copy.deepcopy(_TINY)
    for name, value in sections.items():
        recipe[name] = recipe.get(name, {}) | value if isinstance(value, dict) else value
    return recipe


def write_recipe(path: Path, **sections: Any) -> Path:
    """Write `tiny_recipe` as YAML."""
    path.write_text(yaml.safe_dump(tiny_recipe(**sections)))
    return path


def write_topics(folder: Path) -> Path:
    """Write 24 texts of Python's own help, one a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in list(pydoc_data.topics.topics.items())[:24]:
        (folder / f"{name.replace('/', '-')}.txt").write_text(text)
    return folder
