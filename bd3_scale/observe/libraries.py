"""What other libraries are kept from: warnings that nobody can act on, and a torchvision built for another PyTorch."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_broken_torchvision() -> Iterator[None]:
    """Inside, a torchvision that does not load counts as not installed: transformers, which would import it for image
    models, then leaves it out. Without it, importing any model of transformers fails.
    """
    if sys.modules.get("torchvision", sys) is None:  # inside another
        yield
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        # It asks once, when it is first imported, as megatron-core and others do.
        if (asked := sys.modules.get("transformers.utils.import_utils")) is not None:
            asked._torchvision_available = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del sys.modules["torchvision"]
    else:
        yield


def quieten_libraries() -> None:
    """Hide what megatron-core, DeepSpeed and torch say of each other at import and call; `doctor` tells what is
    missing.

    To be called before they are imported. `python -W` and PYTHONWARNINGS do not bring them back; nothing of our own is
    hidden.
    """
    for module in ("megatron", "deepspeed", "torch", "streaming"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?$")
    # Of megatron-core to itself, about a call of its own; see `model.megatron_core`.
    warnings.filterwarnings("ignore", "Warning: tp_group is None", DeprecationWarning)
