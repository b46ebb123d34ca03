"""Pack quantised weights in the format of compressed-tensors, which SGLang and engines of vLLM's family read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bd3_scale.convert.folder import Weights
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

_PACKED = ".weight_packed"
MARLIN_GROUP_SIZES = (32, 64, 128)
MARLIN_DIVISORS = (64, 128)  # of output and of input features


def packed_tensors(name: str, quantized: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """Return the tensors that replace `<name>.weight`: packed values, int32 [O, I·bits/32], scales [O, G] and shape.

    ValueError: a row does not fill whole 32-bit words, which engines assume.
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
    """Return the bytes of each of `packed_tensors`."""
    return {
        f"{name}.weight_packed": packed_bytes,
        f"{name}.weight_scale": scale_bytes,
        f"{name}.weight_shape": 2 * torch.int64.itemsize,
    }


def unpacked_weight(tensors: Mapping[str, Tensor], name: str, scheme: Scheme) -> Tensor:
    """Return the weight [O, I] that `packed_tensors` packed, in the dtype of its scales."""
    shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    values = unpack_from_int32(tensors[f"{name}.weight_packed"], scheme.bits, shape)
    return QuantizedWeight(values, tensors[f"{name}.weight_scale"]).dequantize()


def engine_notes(shape: tuple[int, int], scheme: Scheme) -> list[str]:
    """Return why Marlin, the CUDA kernel of SGLang and vLLM for such weights, cannot run a layer; empty if it can.

    `shape` is the layer's [O, I] on one rank as an engine joins weights: q, k and v are one layer, gate and up another.
    The conditions are those of `verify_marlin_supports_shape` and `MARLIN_SUPPORTED_GROUP_SIZES` in SGLang.
    """
    notes = []
    if scheme.group_size not in MARLIN_GROUP_SIZES:
        notes.append(f"groups of {scheme.group_size}: Marlin runs those of {', '.join(map(str, MARLIN_GROUP_SIZES))}")
    for features, divisor, kind in zip(shape, MARLIN_DIVISORS, ("output", "input"), strict=True):
        if features % divisor:
            notes.append(f"{features} {kind} features on a rank: Marlin runs multiples of {divisor}")
    return notes


def quantization_config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """Return `quantization_config` of config.json, for all linear layers except `ignore`."""
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


def unpacked_weights(weights: Weights, config: Mapping[str, Any]) -> Weights:
    """Return the tensors of a folder of `convert quantize`; packed ones are unpacked when they are read.

    config: its `quantization_config`. ValueError: it is packed in another way.
    """
    scheme = _scheme_of(config)
    packed = {name.removesuffix(_PACKED) for name in weights.shapes if name.endswith(_PACKED)}
    parts = {part for name in packed for part in _parts_of(name)}
    if lacking := sorted(parts - weights.shapes.keys()):
        raise ValueError(f"{', '.join(lacking[:3])} are not among the tensors: write the folder again")
    shapes = {name: shape for name, shape in weights.shapes.items() if name not in parts}
    dtypes = {name: dtype for name, dtype in weights.dtypes.items() if name not in parts}
    for name in packed:
        rows, groups = weights.shapes[f"{name}.weight_scale"]
        shapes[f"{name}.weight"] = (rows, groups * scheme.group_size)
        dtypes[f"{name}.weight"] = weights.dtypes[f"{name}.weight_scale"]

    def read(name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if module not in packed:
            return weights.read(name)
        return unpacked_weight({part: weights.read(part) for part in _parts_of(module)}, module, scheme)

    return Weights(shapes, dtypes, read)


def _parts_of(module: str) -> list[str]:
    return [f"{module}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")]


def _scheme_of(config: Mapping[str, Any]) -> Scheme:
    """Return the scheme of a packed folder. ValueError: it is packed in another way than `convert quantize` packs."""
    for bits in (4, 8):
        group = ((config.get("config_groups") or {}).get("group_0") or {}).get("weights") or {}
        scheme = Scheme(bits, group.get("group_size") or 1)
        ours = quantization_config(scheme, config.get("ignore") or ())
        if all(config.get(key) == ours[key] for key in ("quant_method", "format", "config_groups")):
            return scheme
    raise ValueError(
        f"its weights are quantised in an unsupported way ({config.get('format')!r}): give a folder of "
        "`bd3-scale convert quantize`, or the weights that it was made from"
    )
