"""Pretrain, adapt, evaluate, sample and export block diffusion language models."""

from __future__ import annotations

from typing import Any

from bd3_scale.lazy import lazy_names

_lazy, __dir__ = lazy_names(__name__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("bd3_scale")
    return _lazy(name)
