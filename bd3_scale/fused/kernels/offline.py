"""Compile the kernels, as they are launched, for chips that need not be present; see `bd3_scale.offline`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from bd3_scale.fused.kernels import cross_entropy, heads, norm, swiglu
from bd3_scale.fused.kernels.tiles import BLOCK, LOGITS, head_tile, norm_tile
from bd3_scale.fused.ops import WIDEST_NORM
from bd3_scale.offline import Usage, compile_kernel

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_FLOAT32 = {"SCALE", "PART", "FOUND", "LOG_TOTAL", "SOFTMAX_SCALE", "TARGET_SCALE"}
_OTHERS = {"TARGETS": "*i64", "FORBIDDEN": "*u8", "eps": "fp32"}
_FUNCTIONS = {
    "swiglu": swiglu.swiglu_kernel,
    "swiglu_backward": swiglu.swiglu_backward_kernel,
    "add_rms_norm": norm.add_rms_norm_kernel,
    "add_rms_norm_backward": norm.add_rms_norm_backward_kernel,
    "qkv_heads": heads.qkv_heads_kernel,
    "qkv_heads_backward": heads.qkv_heads_backward_kernel,
    "row_statistics": cross_entropy.row_statistics_kernel,
    "logit_gradient_": cross_entropy.logit_gradient_kernel,
}


class Variant(NamedTuple):
    """One way in which a kernel is launched; `size` is that of a row that is normed, or of a head."""

    kernel: str
    dtype: torch.dtype
    size: int = 0
    queries: int = 4
    normed: bool = True

    def __str__(self) -> str:
        size = f" {self.size}" * bool(self.size)
        queries = f" q{self.queries}" * self.kernel.startswith("qkv") + " without norms" * (not self.normed)
        return f"{self.kernel}{size} {_TYPES[self.dtype]}{queries}"

    @property
    def num_warps(self) -> int:
        """Return the number of warps of a program."""
        if self.kernel.startswith("add_rms_norm"):
            return norm_tile(self.size).num_warps
        return LOGITS.num_warps if self.kernel in ("row_statistics", "logit_gradient_") else 4


def variants() -> list[Variant]:
    """Return every kernel in its most common form, then in others: fp32 and fp16, narrow and wide rows and heads."""
    common = {"qkv": 128, "add": 4096}
    found = [Variant(kernel, torch.bfloat16, common.get(kernel[:3], 0)) for kernel in _FUNCTIONS]
    for first in list(found):
        others = {"qkv": [64, 80, 256], "add": [256, 2560, 8192, WIDEST_NORM]}.get(first.kernel[:3], [])
        found += [first._replace(dtype=dtype) for dtype in (torch.float32, torch.float16)]
        found += [
            first._replace(size=size, dtype=dtype) for size in others for dtype in (torch.bfloat16, torch.float32)
        ]
        if first.kernel.startswith("qkv"):
            found += [first._replace(queries=0), first._replace(queries=1, normed=False)]
    return found


def compile_variant(variant: Variant, chip: int) -> Usage:
    """Compile a variant for `sm_<chip>` and return what `compile_kernel` reads off it."""
    function = _FUNCTIONS[variant.kernel]
    constants = {name: value for name, value in _constants(variant).items() if name in function.arg_names}
    types = {name: _type(variant, name) for name in function.arg_names if name not in constants}
    return compile_kernel(function, types, constants, _aligned(types), chip, num_warps=variant.num_warps, num_stages=3)


def _constants(variant: Variant) -> dict[str, Any]:
    if variant.kernel.startswith("qkv"):
        tile = head_tile(variant.size)
        return {
            "Q": variant.queries, "GROUPS": 8, "HALF": variant.size // 2, "PADDED": tile.padded, "HEADS": tile.heads,
            "NORM": variant.normed,
        }  # fmt: skip
    if variant.kernel.startswith("add_rms_norm"):
        rows = norm_tile(variant.size)
        return {"ROWS": rows.rows, "BLOCK": rows.block, "HAS_TOTAL": True, "HAS_B": True}
    return {"BLOCK": BLOCK if variant.kernel.startswith("swiglu") else LOGITS.block}


def _type(variant: Variant, name: str) -> str:
    if name in _OTHERS:
        return _OTHERS[name]
    if not name.isupper():
        return "i32"
    return "*fp32" if name in _FLOAT32 else f"*{_TYPES[variant.dtype]}"


def _aligned(types: dict[str, str]) -> set[str]:
    """Return the arguments that are multiples of 16: tensors, and sizes and strides, in the common case."""
    return {name for name, kind in types.items() if kind.startswith("*") or name.endswith(("_row", "size", "channels"))}
