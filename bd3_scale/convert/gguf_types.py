"""Choose and encode the types of a GGUF file's tensors, as llama.cpp's own quantiser chooses them.

`ggml_quantize_chunk` of llama.cpp's library quantises rows. Which type a tensor gets in a mixture such as `q4_k_m`
follows `llama_model_quantize` (`src/llama-quant.cpp`): weights that matter more get more bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3_scale.generate.llama_cpp import quantized_rows
from bd3_scale.recipe.schema import ModelRecipe

FileType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k"]
# Name of a mixture -> its `llama_ftype` in llama.h, and the default type of its tensors.
FILE_TYPES: Mapping[FileType, tuple[int, str]] = {
    "f32": (0, "F32"),
    "f16": (1, "F16"),
    "bf16": (32, "BF16"),
    "q8_0": (7, "Q8_0"),
    "q6_k": (18, "Q6_K"),
    "q5_k_m": (17, "Q5_K"),
    "q4_k_m": (15, "Q4_K"),
    "q4_0": (2, "Q4_0"),
    "q3_k_m": (12, "Q3_K"),
    "q2_k": (10, "Q2_K"),
}


@dataclass(frozen=True)
class TensorType:
    """A ggml type: its number in ggml.h, and the values and bytes of a block."""

    number: int
    block: int
    bytes: int

    def size(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor, whose rows must be whole blocks."""
        assert shape[-1] % self.block == 0
        return math.prod(shape) // self.block * self.bytes


TYPES: Mapping[str, TensorType] = {
    "F32": TensorType(0, 1, 4),
    "F16": TensorType(1, 1, 2),
    "BF16": TensorType(30, 1, 2),
    "Q4_0": TensorType(2, 32, 18),
    "Q4_1": TensorType(3, 32, 20),
    "Q5_0": TensorType(6, 32, 22),
    "Q5_1": TensorType(7, 32, 24),
    "Q8_0": TensorType(8, 32, 34),
    "Q2_K": TensorType(10, 256, 84),
    "Q3_K": TensorType(11, 256, 110),
    "Q4_K": TensorType(12, 256, 144),
    "Q5_K": TensorType(13, 256, 176),
    "Q6_K": TensorType(14, 256, 210),
}
# Replacements if blocks of 256 do not divide a row, as in llama.cpp.
_SMALLER_BLOCKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_PLAIN = ("F32", "F16", "BF16")


def is_quantized(kind: FileType) -> bool:
    """Tell whether a file's weights are quantised in blocks."""
    return FILE_TYPES[kind][1] not in _PLAIN


def uses_importance(kind: FileType) -> bool:
    """Tell whether an importance matrix changes how weights are rounded; q8_0 rounds each to the nearest."""
    return is_quantized(kind) and kind != "q8_0"


def tensor_type(
    name: str, shape: tuple[int, ...], layer: int | None, kind: FileType, model: ModelRecipe, *, importance: bool
) -> str:
    """Return the type of a tensor in a file of `kind`, by its name in llama.cpp.

    Vectors, norms and routers stay in float32. importance: whether an importance matrix is used.
    """
    if len(shape) < 2 or name.endswith(".ffn_gate_inp.weight"):
        return "F32"
    default = FILE_TYPES[kind][1]
    if default in _PLAIN:
        return default
    chosen = _mixed(name, layer, kind, default, model, importance)
    if shape[-1] % TYPES[chosen].block:
        chosen = _SMALLER_BLOCKS.get(chosen, chosen)
    return "F16" if shape[-1] % TYPES[chosen].block else chosen


def _mixed(name: str, layer: int | None, kind: FileType, default: str, model: ModelRecipe, importance: bool) -> str:
    if name == "output.weight":
        return "Q8_0" if kind == "q8_0" else "Q6_K"
    if layer is None:
        return default
    layers, part = model.num_layers, name.split(".")[2].removesuffix("_exps").removesuffix("_shexp")
    if part == "attn_qkv":
        part = "attn_v"
    if model.moe is not None and model.moe.num_experts == 8:  # as Mixtral, for which these were chosen
        if part in ("attn_k", "attn_v"):
            return "Q8_0"
        if part == "attn_output" and kind in ("q2_k", "q3_k_m", "q4_k_m"):
            return "Q5_K"
    sensitive = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    shared = model.num_attention_heads // model.query_groups >= 4
    choices = {
        ("q2_k", "attn_v"): "Q4_K" if shared else "Q3_K",
        ("q2_k", "attn_output"): "Q3_K",
        ("q2_k", "ffn_down"): "Q3_K",
        ("q3_k_m", "attn_v"): "Q5_K" if layer < 2 else "Q4_K",
        ("q3_k_m", "attn_output"): "Q4_K",
        ("q3_k_m", "ffn_down"): "Q5_K" if layer < layers // 16 else "Q4_K",
        ("q4_k_m", "attn_v"): "Q6_K" if sensitive else default,
        ("q4_k_m", "ffn_down"): "Q6_K" if sensitive else default,
        ("q5_k_m", "attn_v"): "Q6_K" if sensitive else default,
        ("q5_k_m", "ffn_down"): "Q6_K" if sensitive else default,
        # Q4_0 has no offset; the first layers' down projections are sensitive to that, and Q4_1 has one.
        ("q4_0", "ffn_down"): "Q4_1" if importance and layer < layers // 8 else default,
    }
    return choices.get((kind, part), default)


def encoded(values: Tensor, kind: str, importance: Tensor | None) -> NDArray[np.generic]:
    """Encode a tensor: as numbers of the type's width, or rows of blocks as uint8.

    values: fp32. importance: fp32 [columns], see `quantized_rows`.
    ValueError: a value is not finite, in float32 or in the type.
    """
    if not values.isfinite().all():
        raise ValueError("a weight is not finite: export an earlier checkpoint")
    if kind == "F32":
        return values.numpy()
    if kind in _PLAIN:
        rounded = values.to(torch.float16 if kind == "F16" else torch.bfloat16)
        if not rounded.isfinite().all():
            raise ValueError(f"a weight of {values.abs().max():g} exceeds the range of {kind}: use --type bf16 or f32")
        return rounded.view(torch.int16).numpy()
    form = TYPES[kind]
    row_bytes = values.shape[-1] // form.block * form.bytes
    weights = None if importance is None else importance.numpy()
    return quantized_rows(form.number, np.ascontiguousarray(values.numpy()), row_bytes, weights)
