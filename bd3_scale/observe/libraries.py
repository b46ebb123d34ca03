"""Hide warnings of other libraries that nobody can act on, and a torchvision built for another PyTorch."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_broken_torchvision() -> Iterator[None]:
    """Hide a torchvision that does not load inside the block, so that transformers counts it as not installed.

    transformers imports torchvision for image models. If it was built for another PyTorch, that import fails, and with
    it the import of any model.
    """
    if sys.modules.get("torchvision", sys) is None:  # nested in another block
        yield
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        # transformers decides this once, at its first import, and megatron-core and others may have imported it.
        if (decided := sys.modules.get("transformers.utils.import_utils")) is not None:
            decided._torchvision_available = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del sys.modules["torchvision"]
    else:
        yield


def quieten_libraries() -> None:
    """Hide the warnings of megatron-core, DeepSpeed and torch about each other; `doctor` reports missing packages.

    Call it before they are imported. `python -W` and PYTHONWARNINGS do not bring them back. Warnings of bd3_scale are
    not hidden.
    """
    for module in ("megatron", "deepspeed", "torch", "streaming"):
        warnings.filterwarnings("ignore", module=rf"{module}(\..*)?$")
    # megatron-core warns about a call of its own; see `model.megatron_core`.
    warnings.filterwarnings("ignore", "Warning: tp_group is None", DeprecationWarning)
