"""Read the properties of the first processor from Linux: its vendor, its name and its flags."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path


@functools.cache
def fields() -> Mapping[str, str]:
    """Return the first processor's fields in /proc/cpuinfo."""
    first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def flags() -> frozenset[str]:
    """Return its instruction set extensions, such as "avx512f" (`flags` on x86, `Features` on ARM)."""
    return frozenset(f"{fields().get('flags', '')} {fields().get('Features', '')}".split())


def multiplies_bf16() -> bool:
    """Say whether it multiplies bf16 in hardware: AVX512-BF16 or AMX on x86, the BF16 extension on ARM."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags())


def vendor() -> str:
    """Return its vendor, such as "GenuineIntel" or "AuthenticAMD"; "" on ARM."""
    return fields().get("vendor_id", "")
