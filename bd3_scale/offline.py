"""Compilation of Triton kernels for chips that need not be present, and what the compiled code uses.

Needs Triton alone: its wheel brings the assembler and the disassembler.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that one program may have, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

# The last two are those of 16 bytes, the widest.
_COUNTED = (
    "HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTMALDG", "UTMAREDG", "LDGSTS", "LDL", "STL", "RED", "REDG", "LDG.E.128",
    "STG.E.128",
)  # fmt: skip

Variant = TypeVar("Variant")


class Usage(NamedTuple):
    """Hold what one compiled variant takes; `instructions` counts SASS instructions by the start of their names."""

    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]


def compile_all(
    compile_variant: Callable[[Variant, int], Usage], work: Sequence[tuple[int, Variant]]
) -> Iterator[Usage]:
    """Apply `compile_variant` to each variant and its chip, on all processors, in order and as they are ready."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_variant, [variant for _, variant in work], [chip for chip, _ in work])


def compile_kernel(
    function: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Collection[str],
    chip: int,
    *,
    num_warps: int,
    num_stages: int,
) -> Usage:
    """Compile for `sm_<chip>` and read registers, stack and shared memory (bytes) and instructions off the binary.

    types: of arguments by name, as Triton writes them; those that are in `constants` need none.
    aligned: arguments that are multiples of 16, in bytes where they are pointers.
    """
    names = list(function.arg_names)
    source = ASTSource(
        fn=function,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(i,): constants[name] for i, name in enumerate(names) if name in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    return _usage(compiled.asm["cubin"], compiled.metadata.shared)


def _usage(cubin: bytes, shared: int) -> Usage:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(tool), "-res-usage", "-sass", str(file)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found, printed
    names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", printed, re.MULTILINE)
    counts = {counted: sum(_is(name, counted) for name in names) for counted in _COUNTED}
    return Usage(int(found[1]), int(found[2]), shared, {name: n for name, n in counts.items() if n})


def _is(name: str, counted: str) -> bool:
    return name == counted or name.startswith(f"{counted}.")
