"""Define one transformer layer, for training, prefill and decoding: attention and an MLP on a residual stream.

Read `Block.forward` first, then `Attention` and `MLP`. Two things are elsewhere: how a matrix product is split over
ranks (`linear`), and which keys a query sees, those of the same pass or of a cache (`attend`).

Legend: x is [N, B, X] in training and prefill: N rows of hidden size X of each of B sequences, noisy copies and then
clean tokens (`rows`). It is [B, L, X] where a block of L tokens is decoded. Both are written […, X]. G key/value
heads of this tensor-parallel rank, q query heads for each of them, H = G·q, D dimensions a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from bd3_scale.fused.heads import qkv_heads, qkv_heads_
from bd3_scale.fused.norm import add_rms_norm
from bd3_scale.fused.swiglu import swiglu, swiglu_backward
from bd3_scale.model.linear import Activation, ColumnLinear, RowLinear, fuses
from bd3_scale.model.rows import RowContext
from bd3_scale.recipe.schema import ModelRecipe, RopeScaling

TensorMap = Callable[[Tensor], Tensor]


def _by_autograd(function: TensorMap) -> Activation:
    """Return an activation whose gradient autograd computes."""

    def backward(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = function(x)
        return torch.autograd.grad(out, x, gradient)[0], out.detach()

    return Activation(function, backward)


ACTIVATIONS: Mapping[str, Activation] = {
    "swiglu": Activation(swiglu, swiglu_backward),
    "gelu": _by_autograd(F.gelu),
    "gelu_tanh": _by_autograd(functools.partial(F.gelu, approximate="tanh")),
}


def rotary_table(positions: Tensor, model: ModelRecipe, dtype: torch.dtype) -> Tensor:
    """Return cos and sin of the rotary position embedding (RoPE: Su et al., 2021), computed in fp32.

    Positions are an argument, and not row numbers as in megatron-core: a noisy row has the position of its clean token,
    and positions restart at every document. In bf16 the angles of positions above 256 would be wrong.

    positions: integers of any shape. Returns [2, *positions.shape, D] in `dtype`: the cosines, and the sines with the
    signs of the rotation, (−sin, sin), for every head.
    """
    frequencies = plain_frequencies(model, positions.device)
    if model.rope_scaling is not None:
        frequencies = stretch(frequencies, model.rope_scaling)
    angles = positions.float()[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).to(dtype)


def plain_frequencies(model: ModelRecipe, device: torch.device | None = None) -> Tensor:
    """Return the angle by which one position rotates each pair of channels, fp32 [D / 2], before any scaling.

    Channel i is paired with channel i + D / 2 (half-split, as Hugging Face's Llama and Qwen have it), also where only
    some of the pairs are rotated.
    """
    rotated = model.rotary_channels
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated
    # The remaining pairs get the angle 0 and stay as they are.
    return F.pad(model.rope_theta**-exponents, (0, (model.head_size - rotated) // 2))


def stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Return the frequencies with the scaling of Llama 3.1 (`rope_type: llama3`) for longer contexts.

    Let a pair make n turns over the context that the model was trained on. With n < low_freq_factor it turns `factor`
    times slower, so that a longer context shows no new angle. With n > high_freq_factor it stays as it is, because it
    encodes the distance of near tokens. Between the two the frequencies are interpolated.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (unscaled + (1 - unscaled) / scaling.factor)


class Part(MegatronModule):
    """A part of a layer that decoding can call as a plain function."""

    def __init__(self, config: TransformerConfig, group: ProcessGroup) -> None:
        super().__init__(config)
        self.tp_group = group

    def for_decoding(self, **instead: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a function that computes `forward` without gradients; it is valid while the weights do not change.

        It is `forward` of a shallow copy, in which every part and linear is replaced by its own `for_decoding`, and
        parameters are plain attributes: calls and attribute lookups of nn.Module take longer than the arithmetic of a
        small model. Other submodules stay as they are.

        instead: attributes to replace in the copy.
        """
        # The exact type: a subclass of a linear, of a plug-in for example, may do more than the product.
        replaceable = {
            name: part
            for name, part in self.named_children()
            if isinstance(part, Part) or type(part) in (ColumnLinear, RowLinear)
        }
        parts = {name: part.for_decoding() for name, part in replaceable.items() if name not in instead}
        twin = object.__new__(type(self))
        twin.__dict__ = {**self.__dict__, **self._parameters, **parts, **instead}
        return twin.forward


class Norm(Part):
    """RMSNorm (Zhang & Sennrich, 2019) or LayerNorm over the last dimension, in the input's dtype."""

    def __init__(self, model: ModelRecipe, config: TransformerConfig, group: ProcessGroup) -> None:
        super().__init__(config, group)
        self.rms = model.normalization == "rmsnorm"
        self.eps = model.norm_eps
        self.shape = (model.hidden_size,)
        self.weight = nn.Parameter(torch.empty(self.shape, dtype=config.params_dtype))
        self.weight.initial = 1  # type: ignore[attr-defined]
        self.bias = nn.Parameter(torch.empty(self.shape, dtype=config.params_dtype)) if model.norm_bias else None

    def forward(self, x: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum x + more (x alone where `more` is None), and its norm."""
        if self.rms:
            return add_rms_norm(x, more, self.weight, self.eps)
        x = x if more is None else x + more
        return x, torch.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class HeadNorm(MegatronModule):
    """The weight of an RMSNorm over the D dimensions of each head, which `qkv_heads` applies."""

    def __init__(self, model: ModelRecipe, config: TransformerConfig, group: ProcessGroup) -> None:
        super().__init__(config)
        self.tp_group = group
        self.weight = nn.Parameter(torch.empty(model.head_size, dtype=config.params_dtype))
        self.weight.initial = 1  # type: ignore[attr-defined]
        # All ranks have this weight, but each rank's gradient comes from its own heads only. The engine sums the
        # gradients over the tensor-parallel group; without the mark the ranks' weights would drift apart.
        self.weight.partial_over_tp = group.size() > 1  # type: ignore[attr-defined]


class Attention(Part):
    """Grouped-query attention with rotary positions and, with `qk_norm`, an RMSNorm of each query and key."""

    def __init__(
        self, model: ModelRecipe, config: TransformerConfig, group: ProcessGroup, *, layer: int, recompute: bool
    ) -> None:
        super().__init__(config, group)
        heads, groups, size = model.num_attention_heads, model.query_groups, model.head_size
        self.layer, self.recompute, self.eps = layer, recompute, model.norm_eps
        self.head_size = size
        self.queries = heads // groups
        # Features are ordered by key/value head: its queries, its key, its value. A tensor-parallel rank's contiguous
        # share of the features then consists of whole heads.
        qkv = (heads + 2 * groups) * size
        self.linear_qkv = ColumnLinear(model.hidden_size, qkv, bias=model.attention_bias, config=config, group=group)
        self.linear_proj = RowLinear(heads * size, model.hidden_size, bias=False, config=config, group=group)
        self.q_layernorm = HeadNorm(model, config, group) if model.qk_norm else None
        self.k_layernorm = HeadNorm(model, config, group) if model.qk_norm else None

    def forward(self, x: Tensor, rows: RowContext, kept: slice | Tensor | None) -> Tensor:
        """Return the rows `kept` of the output […, X] for x […, X]; see `RowContext.kept`.

        A slice of the first rows saves the queries of all others. A mask, in decoding, saves only output projections.
        """
        qkv, kv = self._project(x, rows, kept.stop if isinstance(kept, slice) else len(x))
        if self.recompute and torch.is_grad_enabled():
            out = checkpoint(self._attend, qkv, kv, rows, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self._attend(qkv, kv, rows)
        streams = rows.num_streams if kept is None else rows.kept_streams
        return self.linear_proj(out[kept] if isinstance(kept, Tensor) else out, streams)

    def _project(self, x: Tensor, rows: RowContext, num_queries: int) -> tuple[Tensor, Tensor | None]:
        """Return query, key, value of the first rows, […, G·(q+2)·D], and key, value of the others, […, G·2·D].

        In the last layer nothing reads the clean rows' output, so their queries are not computed.
        """
        if num_queries == len(x):
            return self.linear_qkv(x, rows.num_streams), None
        queries = self.linear_qkv(x[:num_queries], rows.num_noisy)
        clean = rows.num_streams - rows.num_noisy
        return queries, self.linear_qkv(x[num_queries:], clean, select=self._of_keys)

    def _of_keys(self, weight: Tensor) -> Tensor:
        """Take the last 2·D of the (q + 2)·D rows of each key/value head in `linear_qkv`'s weight or bias."""
        heads = weight.unflatten(0, (-1, (self.queries + 2) * self.head_size))
        return heads[:, self.queries * self.head_size :].flatten(0, 1)

    def _attend(self, qkv: Tensor, kv: Tensor | None, rows: RowContext) -> Tensor:
        """Apply norm, rotation and attention: all between the two matrix products. Returns […, H·D].

        This is what selective recomputation computes again in backward: it keeps much and costs little.
        """
        query, key, value = self._heads(qkv, self.queries, rows.rotary[:, : len(qkv)])
        if kv is not None:
            _, more_keys, more_values = self._heads(kv, 0, rows.rotary[:, len(qkv) :])
            key, value = torch.cat([key, more_keys]), torch.cat([value, more_values])
        return rows.attend(self.layer, query, key, value)

    def _heads(self, qkv: Tensor, num_queries: int, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # ZeRO-3 gathers a weight when its module is called, and HeadNorm is never called. Its weight is so small that
        # it is never partitioned (`WHOLE_BELOW` of the engine).
        q_weight, k_weight = (None if norm is None else norm.weight for norm in (self.q_layernorm, self.k_layernorm))
        return qkv_heads(qkv, num_queries, q_weight, k_weight, rotary[0], rotary[1], self.eps)

    def for_decoding(self, **instead: Callable[..., Tensor]) -> Callable[..., Tensor]:
        queries, eps, norms = self.queries, self.eps, (self.q_layernorm, self.k_layernorm)
        weight: Tensor | None = None
        if norms[0] is not None and norms[1] is not None:
            weight = torch.cat([norms[0].weight.expand(queries, -1), norms[1].weight[None]]).detach()

        def attend(qkv: Tensor, kv: None, rows: RowContext) -> Tensor:
            return rows.attend(self.layer, *qkv_heads_(qkv, queries, weight, rows.rotary, eps))

        # A subclass that overrides one of these methods keeps its own code.
        if type(self)._attend is Attention._attend and type(self)._heads is Attention._heads:
            instead = {"_attend": attend, **instead}
        return super().for_decoding(**instead)


class MLP(Part):
    """Two matrix products with the recipe's activation between them (SwiGLU: Shazeer, 2020; or GELU)."""

    def __init__(self, model: ModelRecipe, config: TransformerConfig, group: ProcessGroup) -> None:
        super().__init__(config, group)
        self.activation = model.activation
        self.activate = ACTIVATIONS[model.activation].forward
        self.gated = model.activation == "swiglu"
        wide = model.ffn_hidden_size * (2 if self.gated else 1)
        self.linear_fc1 = ColumnLinear(model.hidden_size, wide, bias=model.mlp_bias, config=config, group=group)
        self.linear_fc2 = RowLinear(
            model.ffn_hidden_size, model.hidden_size, bias=model.mlp_bias, config=config, group=group
        )

    def forward(self, x: Tensor, pieces: int = 1) -> Tensor:
        """Return […, X] for x […, X]; under sequence parallelism rows are exchanged in `pieces`, see `exchange`."""
        wide = self.linear_fc1(x, pieces)
        # On a GPU memory is scarcer than time: backward computes the activation again instead of keeping its output for
        # every layer. On a CPU it is the other way round.
        if wide.is_cuda and torch.is_grad_enabled():
            return self.linear_fc2(wide, pieces, activation=ACTIVATIONS[self.activation])
        return self.linear_fc2(self.activate(wide), pieces)

    def for_decoding(self, **instead: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # oneDNN applies the activation to the product in registers. A subclass with another forward keeps its own code.
        if type(self).forward is MLP.forward and fuses(self.activation, self.linear_fc1):
            instead |= {"linear_fc1": self.linear_fc1.for_decoding(self.activation), "activate": lambda x: x}
        return super().for_decoding(**instead)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Place the two halves of a rank's gated weight separately.

        A rank has its share of the gate and then its share of the up projection. In the whole tensor all of the gate
        comes first, so the two shares are not contiguous there.
        """
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name in ("weight", "bias") if self.gated else ():
            key = f"{prefix}linear_fc1.{name}"
            if key in entries:
                entries[key] = apply_swiglu_sharded_factory(entries[key], sharded_offsets)
        return entries


class Block(Part):
    """A pre-norm transformer layer: x ↦ x' + MLP(norm(x')), where x' = x + attention(norm(x)).

    Args:
        layer: counted from zero through all pipeline stages.
        recompute_attention: compute again in backward what lies between the two products of the attention.
        mlp: what takes the place of the MLP: a `Part` that maps rows, and the number of their pieces, to rows.
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
    ) -> None:
        super().__init__(config, group)
        self.layer, self.num_layers, self.dense_layers = layer, model.num_layers, model.dense_layers
        self.input_layernorm = Norm(model, config, group)
        self.self_attention = Attention(model, config, group, layer=layer, recompute=recompute_attention)
        self.pre_mlp_layernorm = Norm(model, config, group)
        self.mlp = mlp or MLP(model, config, group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Place the tensors of the layer.

        All layers share one tensor in a checkpoint, whose first axis is the layer. Dense MLPs and mixtures of experts
        have tensors of different shapes, so each counts only the layers of its own sort.
        """
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.dense_layers < self.num_layers:
            dense = self.layer < self.dense_layers
            number = self.layer if dense else self.layer - self.dense_layers
            offsets = ((0, number, self.dense_layers if dense else self.num_layers - self.dense_layers),)
            entries |= self.mlp.sharded_state_dict(f"{prefix}mlp.", offsets, metadata)
        return cast(dict[str, Any], entries)

    def forward(
        self, x: Tensor, more: Tensor | None, rows: RowContext, *, add: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream and the MLP's output, which is still to be added to it, both […, X].

        The next norm adds the two in one pass over memory (`add_rms_norm`), unless `add` asks for the sum. The
        arguments x and `more` (None: zero) are such a pair, too.

        The model's last layer returns only the rows whose output is read. Clean rows beside noisy ones serve as keys
        alone there, and so do the unmasked tokens of a block in decoding.
        """
        last = self.layer == self.num_layers - 1
        kept = rows.kept(x) if last else None
        x, normed = self.input_layernorm(x, more)
        attended = self.self_attention(normed, rows, kept)
        x, normed = self.pre_mlp_layernorm(x if kept is None else x[kept], attended)
        more = self.mlp(normed, rows.kept_streams if last else rows.num_streams)
        return (x + more, None) if add else (x, more)
