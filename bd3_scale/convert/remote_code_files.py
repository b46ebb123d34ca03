"""The modelling code that lies beside the weights of an export and runs in transformers without this package."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

_CLASS_PREFIX = {"sdar": "SDAR", "bd3": "Bd3"}
_MODULES = ("configuration", "modeling", "generation")


def remote_code(kind: Literal["sdar", "bd3"]) -> dict[str, str]:
    """File name → source text of the modules that make up `model_type` `kind`.

    Both kinds are one source: SDAR is this model with the names that engines look for.
    """
    folder = files("bd3_scale.convert") / "remote_code"
    sources = {f"{name}_{kind}.py": folder / f"{name}_bd3.py" for name in _MODULES}
    return {name: _renamed(source.read_text(encoding="utf-8"), kind) for name, source in sources.items()}


def _renamed(text: str, kind: Literal["sdar", "bd3"]) -> str:
    return text.replace("Bd3", _CLASS_PREFIX[kind]).replace("bd3", kind)
