"""Quantised weights as compressed-tensors packs them, which SGLang and engines of vLLM's family read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bd3_scale.convert._libraries import without_broken_torchvision
from bd3_scale.convert.quantizer import QuantizedWeight, Scheme

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


def packed_tensors(name: str, quantized: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """What takes the place of `<name>.weight`: packed values, int32 [O, I·bits/32], scales [O, G] and shape."""
    return {
        f"{name}.weight_packed": pack_to_int32(quantized.values, scheme.bits),
        f"{name}.weight_scale": quantized.scales,
        f"{name}.weight_shape": torch.tensor(quantized.values.shape),
    }


def unpacked_weight(tensors: Mapping[str, Tensor], name: str, scheme: Scheme) -> Tensor:
    """The weight [O, I] that `packed_tensors` packed, in the type of its scales."""
    shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    values = unpack_from_int32(tensors[f"{name}.weight_packed"], scheme.bits, shape)
    return QuantizedWeight(values, tensors[f"{name}.weight_scale"]).dequantize()


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
