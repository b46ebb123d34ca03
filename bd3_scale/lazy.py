"""Let packages offer the names of their modules, and import each module at its first use (PEP 562)."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package that offers the names that its `__init__.pyi` imports.

        __getattr__, __dir__ = lazy_names(__name__)

    Type checkers read the same file, so each name is written once. The file is read when the first name is used.
    """
    module = sys.modules[package]

    @functools.cache
    def homes() -> dict[str, str]:
        import ast
        from pathlib import Path

        assert module.__file__ is not None
        stub = ast.parse(Path(module.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
        imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
        return {alias.name: str(node.module) for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name == "__all__":
            return sorted(homes())
        if name.startswith("__") or name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes()[name]), name)

    return get, lambda: sorted({*vars(module), *homes()})
