"""Compilation of the kernels for chips that need not be present, and what the compiled code uses.

Needs Triton alone: its wheel brings the assembler and the disassembler.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bd3_scale.attention.kernels import backward, decode, forward
from bd3_scale.attention.kernels.tiles import DELTA_ROWS, MOST_SPLITS, SCAN, Tile, candidates, decode_tile, uses_tma

# Shared memory that one program may have, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_FLOAT32 = {"LSE", "DELTA", "PART"}
_INT32 = {"SPANS", "LENGTHS"}
_STREAMED = {
    "forward": ("K", "V"),
    "query_gradient": ("K", "V"),
    "clean_key_gradient": ("Q", "GRAD"),
    "fused_gradient": ("Q", "GRAD", "DQ"),
}
_FUNCTIONS = {
    "forward": forward.forward_kernel,
    "query_gradient": backward.query_gradient_kernel,
    "clean_key_gradient": backward.clean_key_gradient_kernel,
    "fused_gradient": backward.clean_key_gradient_kernel,
    "noisy_key_gradient": backward.noisy_key_gradient_kernel,
    "noisy_fused_gradient": backward.noisy_key_gradient_kernel,
    "decode": decode.decode_kernel,
    "combine": decode.combine_kernel,
    "delta": backward.delta_kernel,
}


# One noisy copy of whole sequences; sizes of one, which Triton compiles as constants; a context-parallel rank's rows of
# any number of copies.
TRAINING, SMALLEST, RANK = "training", "sizes of 1", "a rank's rows"


class Variant(NamedTuple):
    """Name one way in which a kernel is launched."""

    kernel: str
    head_dim: int
    dtype: torch.dtype
    tile: Tile
    tma: bool
    form: str = TRAINING

    def __str__(self) -> str:
        loads = "TMA" if self.tma else "pointers"
        form = f" {self.form}" * (self.form != TRAINING)
        return f"{self.kernel} D{self.head_dim} {_TYPES[self.dtype]} {self.tile.rows}×{self.tile.keys} {loads}{form}"


class Usage(NamedTuple):
    """Hold what one compiled variant takes; `instructions` counts SASS instructions by the start of their names."""

    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]


_COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTMALDG", "UTMAREDG", "LDGSTS", "LDL", "STL", "RED", "REDG")


def variants(chip: int) -> list[Variant]:
    """Return every tile of every kernel for 64, 128 and 256 dimensions a head, as launched on `chip` (90 for sm_90).

    bfloat16 and float32; float16 and the other forms with the first tile of one head dimension.
    """
    capability = divmod(chip, 10)
    found: dict[Variant, None] = {}
    for kernel, head_dim, dtype in itertools.product(_FUNCTIONS, (64, 128, 256), (torch.bfloat16, torch.float32)):
        if dtype == torch.float32 and head_dim == 256:
            continue
        tma = uses_tma(capability) and kernel in _STREAMED
        tiles = _tiles(kernel, head_dim, dtype, capability)
        found |= dict.fromkeys(Variant(kernel, head_dim, dtype, tile, tma) for tile in tiles)
        if (head_dim, dtype) == (64, torch.bfloat16):
            found[Variant(kernel, head_dim, dtype, tiles[0], tma, SMALLEST)] = None
        if (head_dim, dtype) == (128, torch.bfloat16):
            found[Variant(kernel, head_dim, torch.float16, tiles[0], tma, RANK)] = None
    return list(found)


def _tiles(kernel: str, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> tuple[Tile, ...]:
    if kernel == "combine":
        return (Tile(MOST_SPLITS, head_dim, 4, 1),)
    if kernel == "delta":
        return (Tile(DELTA_ROWS, head_dim, 4, 1),)
    if kernel == "decode":
        return tuple(decode_tile(rows, head_dim, dtype) for rows in (16, 64))
    return candidates(kernel.replace("noisy_fused", "noisy_key"), head_dim, dtype, capability)


def compile_all(work: Sequence[tuple[int, Variant]]) -> Iterator[Usage]:
    """Apply `compile_variant` to each chip and variant, on all processors, in order and as they are ready."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_variant, [variant for _, variant in work], [chip for chip, _ in work])


def compile_variant(variant: Variant, chip: int) -> Usage:
    """Compile for `sm_<chip>` and read registers, stack and shared memory (bytes) and instructions off the binary."""
    function = _FUNCTIONS[variant.kernel]
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    given = _constants(variant)
    for i, name in enumerate(function.arg_names):
        if name in given:
            signature[name], constants[(i,)] = "constexpr", given[name]
            continue
        signature[name] = _type(variant, name)
        if signature[name].startswith("*") or re.fullmatch(r"\w+_[bnh]|num_rows|num_keys|keys_per_split", name):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": variant.tile.num_warps, "num_stages": variant.tile.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    return _usage(compiled.asm["cubin"], compiled.metadata.shared)


def _constants(variant: Variant) -> dict[str, Any]:
    tile = variant.tile
    sizes = ("batch_size", "num_heads", "num_rows", "num_streams", "num_queries", "num_splits")
    constants: dict[str, Any] = {
        "GROUP": 1 if variant.form == SMALLEST else 4, "BM": tile.rows, "BN": tile.keys, "D": variant.head_dim,
        "TMA": variant.tma, "FUSED": "fused" in variant.kernel, "PRECISION": "tf32x3", "SCAN": SCAN,
        "SPLITS": MOST_SPLITS, "NUM_SPANS": 5 if variant.form == RANK else 3, "HAS_LENGTHS": variant.form != RANK,
    }  # fmt: skip
    if variant.form == RANK:
        return {**constants, "LENGTHS": None}
    return {**constants, "num_noisy": 1, **dict.fromkeys(sizes if variant.form == SMALLEST else (), 1)}


def _type(variant: Variant, name: str) -> str:
    if not name.isupper():
        return "fp32" if name.startswith("scale") else "i32"
    element = _TYPES[variant.dtype]
    if name in _FLOAT32 or (name == "DQ" and "fused" in variant.kernel):
        element = "fp32"
    if name in _INT32:
        element = "i32"
    if variant.tma and name in _STREAMED[variant.kernel]:
        rows = variant.tile.keys if name in ("K", "V") else variant.tile.rows
        return f"tensordesc<{element}[1, 1, {rows}, {variant.head_dim}]>"
    return f"*{element}"


def _usage(cubin: bytes, shared: int) -> Usage:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(tool), "-res-usage", "-sass", str(file)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found, printed
    names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", printed, re.MULTILINE)
    counts = {name: names.count(name) for name in _COUNTED}
    return Usage(int(found[1]), int(found[2]), shared, {name: n for name, n in counts.items() if n})
