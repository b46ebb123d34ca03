"""Compile Triton kernels for chips that need not be present, and read off what the compiled code uses.

No GPU and no CUDA toolkit is needed: Triton's wheel contains ptxas and cuobjdump. A register that spills, or a product
that misses the tensor cores, shows in the compiled code, where the interpreter would hide it.
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

# The most shared memory of one program, in bytes, by compute capability (CUDA C++ Programming Guide, technical
# specifications).
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

# SASS instructions to count: tensor-core products, TMA, asynchronous copies, spills (LDL, STL), atomic additions, and
# loads and stores of 16 bytes, the widest.
_COUNTED = (
    "HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTMALDG", "UTMAREDG", "LDGSTS", "LDL", "STL", "RED", "REDG", "LDG.E.128",
    "STG.E.128",
)  # fmt: skip

Variant = TypeVar("Variant")


class Usage(NamedTuple):
    """The resources of a compiled variant; `instructions` counts SASS instructions by the beginning of their names."""

    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]


def compile_all(
    compile_variant: Callable[[Variant, int], Usage], work: Sequence[tuple[int, Variant]]
) -> Iterator[Usage]:
    """Apply `compile_variant` to each variant and its chip, on all processors; yield results in order."""
    # Spawned, not forked: a fork of a process with threads, as PyTorch has them, may deadlock.
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
    """Compile for `sm_<chip>`; read registers, stack and shared memory (in bytes) and instructions off the binary.

    types: Triton's types of the arguments, by name; arguments in `constants` need none.
    aligned: arguments that are multiples of 16, or pointers to multiples of 16 bytes. Triton generates wide loads only
        for these.
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
