"""Warnings of libraries that nobody who runs bd3_scale can act on."""

from __future__ import annotations

import warnings


def quieten_libraries() -> None:
    """Hide what megatron-core, DeepSpeed and torch say of each other at import and call; `doctor` tells what is
    missing.

    To be called before they are imported. `python -W` and PYTHONWARNINGS do not bring them back; nothing of our own is
    hidden.
    """
    for module in ("megatron", "deepspeed", "torch", "streaming"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?$")
