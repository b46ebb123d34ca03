"""Compile kernels for GPUs that this machine does not have, and remember what they take from one run to the next.

The results are kept in pytest's cache folder until a kernel or Triton changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import pytest
import triton

from bd3_scale import offline
from bd3_scale.offline import Usage, compile_all
from bd3_scale.resilience.files import write_atomically

Variant = TypeVar("Variant")


def compiled(
    kernels: ModuleType,
    compile_variant: Callable[[Variant, int], Usage],
    work: list[tuple[int, Variant]],
    request: pytest.FixtureRequest,
) -> list[tuple[int, Variant, Usage]]:
    """Return chip, variant and usage of `work`; kernels: the package of their sources."""
    files = [*sorted(Path(kernels.__path__[0]).glob("*.py")), Path(str(offline.__file__))]
    sources = b"".join(path.read_bytes() for path in files)
    key = hashlib.sha256(sources + triton.__version__.encode()).hexdigest()
    kept = request.config.cache.mkdir("kernels") / f"{key}.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    missing = [(chip, variant) for chip, variant in work if name_of(chip, variant) not in known]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for (chip, variant), usage in zip(missing, compile_all(compile_variant, missing), strict=True):
            known[name_of(chip, variant)] = usage
            print(f"{name_of(chip, variant)}: {usage}")
    write_atomically(kept, json.dumps(known))
    return [(chip, variant, Usage(*known[name_of(chip, variant)])) for chip, variant in work]


def name_of(chip: int, variant: object) -> str:
    return f"sm_{chip} {variant!r}"
