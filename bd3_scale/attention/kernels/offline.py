"""Compile the attention kernels, as they are launched, for chips that need not be present; see `bd3_scale.offline`."""

from __future__ import annotations

import itertools
import re
from typing import Any, NamedTuple

import torch

from bd3_scale.attention.kernels import backward, decode, forward
from bd3_scale.attention.kernels.tiles import DELTA_ROWS, MOST_SPLITS, SCAN, Tile, candidates, decode_tile, uses_tma
from bd3_scale.offline import Usage, compile_kernel

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

# Forms of a launch that compile differently: one noisy copy of whole sequences; sizes of 1, which Triton turns into
# constants; a context-parallel rank's rows with any number of copies.
TRAINING, SMALLEST, RANK = "training", "sizes of 1", "a rank's rows"


class Variant(NamedTuple):
    """One way in which a kernel is launched."""

    kernel: str
    head_dim: int
    dtype: torch.dtype
    tile: Tile
    tma: bool
    form: str = TRAINING

    def __str__(self) -> str:
        loads = "TMA" if self.tma else "pointers"
        form = f" {self.form}" * (self.form != TRAINING)
        tile = f"{self.tile.rows}×{self.tile.keys}, {self.tile.num_stages} stages"
        return f"{self.kernel} D{self.head_dim} {_TYPES[self.dtype]} {tile} {loads}{form}"

    @property
    def num_warps(self) -> int:
        """Return the number of warps of a program."""
        return self.tile.num_warps


def variants(chip: int) -> list[Variant]:
    """Return every tile of every kernel for 64, 128 and 256 dimensions a head, as launched on `chip` (90 for sm_90).

    In bfloat16 and float32. float16 and the other forms come with the first tile of one head dimension alone, since
    each compilation takes seconds.
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


def compile_variant(variant: Variant, chip: int) -> Usage:
    """Compile a variant for `sm_<chip>` and return what `compile_kernel` reads off it."""
    function = _FUNCTIONS[variant.kernel]
    constants = _constants(variant)
    types = {name: _type(variant, name) for name in function.arg_names if name not in constants}
    sizes = r"\w+_[bnh]|num_rows|num_keys|keys_per_split"
    aligned = {name for name, kind in types.items() if kind.startswith("*") or re.fullmatch(sizes, name)}
    given = {name: value for name, value in constants.items() if name in function.arg_names}
    tile = variant.tile
    return compile_kernel(function, types, given, aligned, chip, num_warps=tile.num_warps, num_stages=tile.num_stages)


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
