"""One transformer layer, for training, prefill and decoding alike: attention and an MLP that add to a residual stream.

Read `Block.forward` first, then `Attention` and `MLP`. Two things are elsewhere: how a product is split over ranks
(`linear`), and which keys a query sees, those of the same pass or a cache's (`attend`).

Legend: x is [N, B, X] in training and prefill: N rows of hidden size X of each of B sequences, noisy copies and then
clean tokens (`rows`). It is [B, L, X] where a block of L tokens is decoded. Both are written […, X]. G key/value
heads of this tensor-parallel rank, q query heads for each of them, H = G·q, D dimensions a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from bd3_scale.model.linear import ColumnLinear, RowLinear, fuses
from bd3_scale.model.rows import RowContext, by_rank, by_stream
from bd3_scale.recipe.schema import ModelRecipe, RopeScaling

TensorMap = Callable[[Tensor], Tensor]


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) · up of x = [gate, up] (Shazeer, 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS: Mapping[str, TensorMap] = {
    "swiglu": swiglu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the activation of the recipe's name."""
    return ACTIVATIONS[activation](x)


def rotary_table(positions: Tensor, model: ModelRecipe, dtype: torch.dtype) -> Tensor:
    """Return cos and sin of the angles that turn heads by their positions (Su et al., 2021), computed in fp32.

    Positions are explicit: a noisy row shares its token's, and they restart at every document.

    positions: integers of any shape; returns [2, *positions.shape, 1, 1, D] in `dtype`: cos, and the sines
        with their signs, for every head of […, G, q, D].
    """
    exponents = torch.arange(0, model.head_size, 2, dtype=torch.float32, device=positions.device) / model.head_size
    frequencies = model.rope_theta**-exponents
    if model.rope_scaling is not None:
        frequencies = _stretch(frequencies, model.rope_scaling)
    angles = positions.float()[..., None, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).to(dtype)


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Stretch as Llama 3 does: waves longer than the trained context / low_freq_factor turn `factor` times slower,
    those shorter than it / high_freq_factor as before, and those between by an interpolation.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of heads x […, D] by `rotary_table`: half-split, as in Llama and Qwen."""
    # Decoding needs no gradient, and a function of autograd costs more time than a block's arithmetic.
    return _Rotate.apply(x, *table) if torch.is_grad_enabled() else _turn(x, *table)


class _Rotate(torch.autograd.Function):
    """Its backward turns the other way round; autograd's own would pass over memory more often."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # (low, high) ↦ (low · cos − high · sin, high · cos + low · sin), since the table's sines of the first half are
    # negative. `roll` gives a new tensor, (high, low), which the others change in place: a decoded block is so small
    # that the number of operators is what it costs.
    return x.roll(x.shape[-1] // 2, -1).mul_(sin).addcmul_(x, cos)


def add_norm(x: Tensor, more: Tensor, norm: TensorMap) -> tuple[Tensor, Tensor]:
    """Return x + more, and its norm."""
    x = x + more
    return x, norm(x)


def norm_rotate(x: Tensor, norm: TensorMap | None, table: Tensor) -> Tensor:
    """Norm queries or keys […, D], where the model does that, and turn them by their positions."""
    return rotate(x if norm is None else norm(x), table)


@dataclass(frozen=True)
class Pieces:
    """The functions of a layer between its products. A fused kernel can stand in for any of them.

    A norm is given as a module to call, not as a weight: under ZeRO-3 its weight is whole during that call alone, and a
    kernel that reads it must run there.
    """

    add_norm: Callable[[Tensor, Tensor, TensorMap], tuple[Tensor, Tensor]] = add_norm
    norm_rotate: Callable[[Tensor, TensorMap | None, Tensor], Tensor] = norm_rotate
    activate: Callable[..., Tensor] = activate


class Part(MegatronModule):
    """A part of a layer, which decoding calls as a plain function."""

    def __init__(self, config: TransformerConfig, group: ProcessGroup) -> None:
        super().__init__(config)
        self.tp_group = group

    def for_decoding(self, **instead: TensorMap) -> Callable[..., Tensor]:
        """Return what `forward` computes, without gradients, as long as the weights do not change.

        It is `forward` of a shallow copy, in which every part and linear is replaced by its own `for_decoding` and
        parameters are plain attributes: nn.Module's calls and lookups cost more time than the arithmetic of a small
        model. Other submodules stay what they are.

        instead: attributes of the copy that are otherwise.
        """
        # A linear of another class may add to the product: it is called as it is.
        quick = {
            name: part
            for name, part in self.named_children()
            if isinstance(part, Part) or type(part) in (ColumnLinear, RowLinear)
        }
        parts = {name: part.for_decoding() for name, part in quick.items() if name not in instead}
        twin = object.__new__(type(self))
        twin.__dict__ = {**self.__dict__, **self._parameters, **parts, **instead}
        return twin.forward


class Norm(Part):
    """RMSNorm (Zhang & Sennrich, 2019) or LayerNorm over the last dimension, in the input's dtype.

    of_heads: over the D dimensions of a head, always RMSNorm; else over X, as the recipe has it.
    """

    def __init__(
        self, model: ModelRecipe, config: TransformerConfig, group: ProcessGroup, *, of_heads: bool = False
    ) -> None:
        super().__init__(config, group)
        self.rms = of_heads or model.normalization == "rmsnorm"
        self.eps = model.norm_eps
        self.shape = (model.head_size if of_heads else model.hidden_size,)
        self.weight = nn.Parameter(torch.empty(self.shape, dtype=config.params_dtype))
        self.weight.initial = 1  # type: ignore[attr-defined]
        with_bias = model.norm_bias and not of_heads
        self.bias = nn.Parameter(torch.empty(self.shape, dtype=config.params_dtype)) if with_bias else None
        # A rank's gradient is of its own heads alone: the engine sums it over the tensor-parallel group.
        self.weight.partial_over_tp = of_heads and group.size() > 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class Attention(Part):
    """Grouped-query attention with rotary positions and, by `qk_norm`, an RMSNorm of each query and key."""

    def __init__(
        self,
        model: ModelRecipe,
        config: TransformerConfig,
        group: ProcessGroup,
        *,
        layer: int,
        recompute: bool,
        pieces: Pieces,
    ) -> None:
        super().__init__(config, group)
        heads, groups, size = model.num_attention_heads, model.query_groups, model.head_size
        self.layer, self.recompute, self.pieces = layer, recompute, pieces
        self.head_size = size
        self.queries = heads // groups
        self.sp_ranks = group.size() if config.sequence_parallel else 1
        # The features of a key/value head stand together, its queries, its key, its value, so that a rank's share is
        # whole heads.
        qkv = (heads + 2 * groups) * size
        self.linear_qkv = ColumnLinear(model.hidden_size, qkv, bias=model.attention_bias, config=config, group=group)
        self.linear_proj = RowLinear(heads * size, model.hidden_size, bias=False, config=config, group=group)
        self.q_layernorm = Norm(model, config, group, of_heads=True) if model.qk_norm else None
        self.k_layernorm = Norm(model, config, group, of_heads=True) if model.qk_norm else None

    def forward(self, x: Tensor, rows: RowContext, kept: slice | Tensor | None) -> Tensor:
        """Return the rows `kept` of […, X] for x […, X], see `RowContext.kept`.

        A slice, the first rows, saves the queries of the others; a mask, in decoding, the output projection alone.
        """
        qkv, kv = self._project(x, kept.stop if isinstance(kept, slice) else len(x))
        if self.recompute and torch.is_grad_enabled():
            out = checkpoint(self._attend, qkv, kv, rows, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self._attend(qkv, kv, rows)
        return self.linear_proj(out[kept] if isinstance(kept, Tensor) else out)

    def _project(self, x: Tensor, num_queries: int) -> tuple[Tensor, Tensor | None]:
        """Return query, key, value of the first rows, […, G·(q+2)·D], and key, value of the others, […, G·2·D]."""
        if num_queries == len(x):
            return self.linear_qkv(x), None
        return self.linear_qkv(x[:num_queries]), self.linear_qkv(x[num_queries:], self._of_keys)

    def _of_keys(self, weight: Tensor) -> Tensor:
        """Take the last 2·D of the (q + 2)·D rows of each key/value head in `linear_qkv`'s weight or bias."""
        heads = weight.unflatten(0, (-1, (self.queries + 2) * self.head_size))
        return heads[:, self.queries * self.head_size :].flatten(0, 1)

    def _attend(self, qkv: Tensor, kv: Tensor | None, rows: RowContext) -> Tensor:
        """Norm, rotate and attend: all between the two products. Returns […, H·D]."""
        streams = rows.num_streams if kv is None else rows.num_noisy
        heads = by_stream(qkv, streams, self.sp_ranks).unflatten(-1, (-1, self.queries + 2, self.head_size))
        # One split, whose backward writes each gradient once; three slices would add up three gradients of the whole.
        query, key, value = heads.split([self.queries, 1, 1], dim=-2)  # […, G, q or 1, D]
        if kv is not None:
            more = by_stream(kv, rows.num_streams - streams, self.sp_ranks).unflatten(-1, (-1, 2, self.head_size))
            more_key, more_value = more.split(1, dim=-2)
            key, value = torch.cat([key, more_key]), torch.cat([value, more_value])
        table = rows.rotary if kv is None else rows.rotary[:, : len(query)]
        query = self.pieces.norm_rotate(query, self.q_layernorm, table)
        key = self.pieces.norm_rotate(key, self.k_layernorm, rows.rotary)
        # […, H, D], and twice […, G, D]
        out = rows.attend(self.layer, query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2))
        return by_rank(out, streams, self.sp_ranks)


class MLP(Part):
    """Two products with an activation between them, which may be gated."""

    def __init__(self, model: ModelRecipe, config: TransformerConfig, group: ProcessGroup, *, pieces: Pieces) -> None:
        super().__init__(config, group)
        self.activation, self.pieces = model.activation, pieces
        self.activate = functools.partial(pieces.activate, activation=model.activation)
        self.gated = model.activation == "swiglu"
        wide = model.ffn_hidden_size * (2 if self.gated else 1)
        self.linear_fc1 = ColumnLinear(model.hidden_size, wide, bias=model.mlp_bias, config=config, group=group)
        self.linear_fc2 = RowLinear(
            model.ffn_hidden_size, model.hidden_size, bias=model.mlp_bias, config=config, group=group
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(self.activate(self.linear_fc1(x)))

    def for_decoding(self, **instead: TensorMap) -> Callable[..., Tensor]:
        # The kernel of the product applies the activation, too; another forward may do something else with the product.
        own = type(self).forward is MLP.forward and self.pieces.activate is activate
        if own and fuses(self.activation, self.linear_fc1):
            instead |= {"linear_fc1": self.linear_fc1.for_decoding(self.activation), "activate": lambda x: x}
        return super().for_decoding(**instead)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Place the halves of a rank's weight apart: its share of the gate, and that of the up projection, which in the
        whole tensor comes after all of the gate.
        """
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name in ("weight", "bias") if self.gated else ():
            key = f"{prefix}linear_fc1.{name}"
            if key in entries:
                entries[key] = apply_swiglu_sharded_factory(entries[key], sharded_offsets)
        return entries


class Block(Part):
    """A layer: x ↦ x' + MLP(norm(x')), where x' = x + attention(norm(x)).

    Args:
        layer: counted from zero through all pipeline stages.
        recompute_attention: compute what stands between its products again in backward.
        mlp: what stands in for the MLP: a `Part` from rows to rows.
        pieces: what stands in for the plain functions between products.
    """

    def __init__(
        self,
        model: ModelRecipe,
        config: TransformerConfig,
        group: ProcessGroup,
        *,
        layer: int,
        recompute_attention: bool = False,
        mlp: Part | None = None,
        pieces: Pieces = Pieces(),
    ) -> None:
        super().__init__(config, group)
        self.layer, self.num_layers, self.pieces = layer, model.num_layers, pieces
        self.input_layernorm = Norm(model, config, group)
        self.self_attention = Attention(model, config, group, layer=layer, recompute=recompute_attention, pieces=pieces)
        self.pre_mlp_layernorm = Norm(model, config, group)
        self.mlp = mlp or MLP(model, config, group, pieces=pieces)

    def forward(self, x: Tensor, rows: RowContext) -> Tensor:
        """Return […, X] for x […, X]; of the model's last layer only the rows whose output is read, since beside noisy
        rows clean ones serve as keys there, and in decoding settled tokens do.
        """
        kept = rows.kept(x) if self.layer == self.num_layers - 1 else None
        attended = self.self_attention(self.input_layernorm(x), rows, kept)
        x, normed = self.pieces.add_norm(x if kept is None else x[kept], attended, self.pre_mlp_layernorm)
        return x + self.mlp(normed)
