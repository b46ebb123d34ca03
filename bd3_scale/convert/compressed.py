"""Quantised weights as compressed-tensors packs them, which SGLang and engines of vLLM's family read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bd3_scale.convert.quantizer import QuantizedWeight, Scheme
from bd3_scale.observe.libraries import without_broken_torchvision

with without_broken_torchvision():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        QuantizationStrategy,
        QuantizationType,
    )

MARLIN_GROUP_SIZES = (32, 64, 128)
MARLIN_DIVISORS = (64, 128)  # of output and of input features


def packed_tensors(name: str, quantized: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """What takes the place of `<name>.weight`: packed values, int32 [O, I·bits/32], scales [O, G] and shape.

    ValueError: a row does not fill whole words, which engines take for granted.
    """
    features, each = quantized.values.shape[1], 32 // scheme.bits
    if features % each:
        raise ValueError(
            f"{name} has {features} input features, which do not fill whole words of {each}: take a --group-size that "
            f"is a multiple of {each}"
        )
    return {
        f"{name}.weight_packed": pack_to_int32(quantized.values, scheme.bits),
        f"{name}.weight_scale": quantized.scales,
        f"{name}.weight_shape": torch.tensor(quantized.values.shape),
    }


def packed_sizes(name: str, packed_bytes: int, scale_bytes: int) -> dict[str, int]:
    """Bytes of each of `packed_tensors`."""
    return {
        f"{name}.weight_packed": packed_bytes,
        f"{name}.weight_scale": scale_bytes,
        f"{name}.weight_shape": 2 * torch.int64.itemsize,
    }


def unpacked_weight(tensors: Mapping[str, Tensor], name: str, scheme: Scheme) -> Tensor:
    """The weight [O, I] that `packed_tensors` packed, in the type of its scales."""
    shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    values = unpack_from_int32(tensors[f"{name}.weight_packed"], scheme.bits, shape)
    return QuantizedWeight(values, tensors[f"{name}.weight_scale"]).dequantize()


def engine_notes(shape: tuple[int, int], scheme: Scheme) -> list[str]:
    """What keeps Marlin, the CUDA kernel of SGLang for these weights and one of vLLM's, from a layer; empty if nothing.

    `shape` is the layer's [O, I] on one rank as an engine joins weights: q, k and v are one layer, gate and up another.
    Its conditions are those of `verify_marlin_supports_shape` and `MARLIN_SUPPORTED_GROUP_SIZES` in SGLang.
    """
    notes = []
    if scheme.group_size not in MARLIN_GROUP_SIZES:
        notes.append(f"groups of {scheme.group_size}: Marlin runs those of {', '.join(map(str, MARLIN_GROUP_SIZES))}")
    for features, divisor, kind in zip(shape, MARLIN_DIVISORS, ("output", "input"), strict=True):
        if features % divisor:
            notes.append(f"{features} {kind} features on a rank: Marlin runs multiples of {divisor}")
    return notes


def quantization_config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json: all linear layers but `ignore`."""
    weights = QuantizationArgs(
        num_bits=scheme.bits,
        type=QuantizationType.INT,
        symmetric=True,
        strategy=QuantizationStrategy.GROUP,
        group_size=scheme.group_size,
    )
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignore),
    )
    return config.model_dump(mode="json")
