"""Fold the parameters of the official DiT into the weights of a plain pre-norm transformer.

A block of the DiT computes, with shift, scale and gate from adaLN (models/dit.py; Peebles & Xie, 2023),

    x ← x + gate₁ · W_o attention((norm(x) w₁)(1 + scale₁) + shift₁)
    x ← x + gate₂ · (W₂ gelu(W₁ ((norm(x) w₂)(1 + scale₂) + shift₂) + b₁) + b₂)

adaLN is an affine map of the embedded noise level, and without time conditioning that level is always zero, so the six
vectors are constants. Hence w(1 + scale) becomes the norm's weight, shift its bias, and gate scales the rows of W_o and
of W₂ and b₂.

Arithmetic is in float64, and a result has the dtype of the tensor that it comes from: products of half-precision values
are rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_scale.convert.folder import Weights

Shape = tuple[int, ...]

# Chunks of a block's adaLN output, three for attention and then three for the MLP; the final layer has shift and scale.
_SHIFT, _SCALE, _GATE = 0, 1, 2
_MLP = 3


def parameters(shapes: Mapping[str, Shape], num_layers: int | None) -> dict[str, Shape]:
    """Return names and shapes of the DiT's parameters, in the order in which torch enumerates them (models/dit.py).

    The order matters for the moving average, which is stored as a list.

    Args:
        shapes: of a state dict, from which the sizes are read; it has `vocab_embed.embedding`.
        num_layers: default: the number in the state dict.
    """
    vocab, hidden = shapes["vocab_embed.embedding"]
    layers = [int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))]
    num_layers = num_layers or max(layers, default=0) + 1
    if num_layers > len(shapes):
        raise ValueError(f"the configuration says {num_layers:,} layers, and there are {len(shapes):,} tensors in all")
    ffn = shapes.get("blocks.0.mlp.0.weight", (4 * hidden,))[0]
    cond, frequencies = (*shapes.get("sigma_map.mlp.0.weight", ()), 128, 256)[:2]
    return {
        "vocab_embed.embedding": (vocab, hidden),
        **_linear("sigma_map.mlp.0", cond, frequencies),
        **_linear("sigma_map.mlp.2", cond, cond),
        **{
            f"blocks.{layer}.{name}": shape
            for layer in range(num_layers)
            for name, shape in _block(hidden, ffn, cond).items()
        },
        "output_layer.norm_final.weight": (hidden,),
        **_linear("output_layer.linear", vocab, hidden),
        **_linear("output_layer.adaLN_modulation", 2 * hidden, cond),
    }


def _block(hidden: int, ffn: int, cond: int) -> dict[str, Shape]:
    return {
        "norm1.weight": (hidden,),
        "attn_qkv.weight": (3 * hidden, hidden),
        "attn_out.weight": (hidden, hidden),
        "norm2.weight": (hidden,),
        **_linear("mlp.0", ffn, hidden),
        **_linear("mlp.2", hidden, ffn),
        **_linear("adaLN_modulation", 6 * hidden, cond),
    }


def _linear(name: str, rows: int, columns: int) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


@dataclass(frozen=True)
class _Folded:
    """A folded tensor: `compute` returns its values; its dtype is that of the official tensor `origin`."""

    origin: str
    shape: Shape
    compute: Callable[[], Tensor]


def fold(official: Weights, num_layers: int) -> Weights:
    """Return the plain transformer's weights, each computed when it is read.

    Args:
        official: the parameters of a DiT without time conditioning, complete and in their shapes.
    """
    folding = _Folding(official)
    tensors = {"model.embed_tokens.weight": folding.same("vocab_embed.embedding")}
    for layer in range(num_layers):
        tensors |= folding.layer(f"blocks.{layer}", f"model.layers.{layer}")
    tensors |= folding.norm("output_layer.norm_final", "output_layer", _SHIFT, "model.norm")
    tensors |= {f"lm_head.{part}": folding.same(f"output_layer.linear.{part}") for part in ("weight", "bias")}
    dtypes = {name: official.dtypes[tensor.origin] for name, tensor in tensors.items()}
    return Weights(
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        dtypes=dtypes,
        read=lambda name: tensors[name].compute().to(dtypes[name]),
    )


class _Folding:
    """Computes the folded tensors of one model."""

    def __init__(self, official: Weights) -> None:
        self._official = official
        self._hidden = official.shapes["vocab_embed.embedding"][1]

    def layer(self, block: str, to: str) -> dict[str, _Folded]:
        """Return the tensors of a block, under the prefix `to`."""
        attention, mlp = f"{to}.self_attn", f"{to}.mlp"
        return {
            **self.norm(f"{block}.norm1", block, _SHIFT, f"{to}.input_layernorm"),
            **{f"{attention}.{letter}_proj.weight": self._third(block, i) for i, letter in enumerate("qkv")},
            f"{attention}.o_proj.weight": self._gated(f"{block}.attn_out.weight", block, _GATE),
            **self.norm(f"{block}.norm2", block, _MLP + _SHIFT, f"{to}.post_attention_layernorm"),
            **{f"{mlp}.up_proj.{part}": self.same(f"{block}.mlp.0.{part}") for part in ("weight", "bias")},
            **{
                f"{mlp}.down_proj.{part}": self._gated(f"{block}.mlp.2.{part}", block, _MLP + _GATE)
                for part in ("weight", "bias")
            },
        }

    def same(self, name: str) -> _Folded:
        """Return a tensor unchanged."""
        return _Folded(name, self._official.shapes[name], partial(self._official.read, name))

    def norm(self, norm: str, module: str, shift: int, to: str) -> dict[str, _Folded]:
        """Fold a modulated norm: (x̂ w)(1 + scale) + shift = x̂ (w (1 + scale)) + shift.

        `shift` is the index of the shift's chunk of `module`'s adaLN output; the scale's chunk follows it.
        """
        name, scale = f"{norm}.weight", shift + _SCALE - _SHIFT

        def weight() -> Tensor:
            return self._double(name) * (1 + self._modulation(module, scale))

        bias = partial(self._modulation, module, shift)
        shape = (self._hidden,)
        return {f"{to}.weight": _Folded(name, shape, weight), f"{to}.bias": _Folded(name, shape, bias)}

    def _third(self, block: str, index: int) -> _Folded:
        """Return query, key or value: the rows of the fused projection are ordered (three, head, channel)."""
        name, hidden = f"{block}.attn_qkv.weight", self._hidden
        rows = slice(index * hidden, (index + 1) * hidden)
        return _Folded(name, (hidden, hidden), lambda: self._official.read(name)[rows].clone())

    def _gated(self, name: str, module: str, gate: int) -> _Folded:
        """Fold a gate: gate · (W x + b) = (gate · W) x + gate · b, where the gate scales the rows of W."""
        shape = self._official.shapes[name]

        def scaled() -> Tensor:
            return self._double(name) * self._modulation(module, gate).view(-1, *(1,) * (len(shape) - 1))

        return _Folded(name, shape, scaled)

    def _double(self, name: str) -> Tensor:
        return self._official.read(name).double()

    def _modulation(self, module: str, chunk: int) -> Tensor:
        """Return one chunk of adaLN's output for noise level zero, float64 [hidden]."""
        rows = slice(chunk * self._hidden, (chunk + 1) * self._hidden)
        weight, bias = (self._official.read(f"{module}.adaLN_modulation.{part}")[rows] for part in ("weight", "bias"))
        return weight.double() @ self._condition + bias.double()

    @cached_property
    def _condition(self) -> Tensor:
        """Return the input of adaLN for noise level zero, float64 [conditioning width].

        The level is embedded by sinusoids, at zero ones (cos) and then zeros (sin), an MLP and silu.
        """
        first = self._double("sigma_map.mlp.0.weight")
        sinusoids = (torch.arange(first.shape[1]) < first.shape[1] // 2).double()
        hidden = F.silu(first @ sinusoids + self._double("sigma_map.mlp.0.bias"))
        return F.silu(self._double("sigma_map.mlp.2.weight") @ hidden + self._double("sigma_map.mlp.2.bias"))
