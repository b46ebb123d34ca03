"""Self-attention over noisy and clean rows: megatron-core's projections around the attention of this project.

Legend: N rows of a rank (split over tensor-parallel ranks under sequence parallelism), S streams, R positions, B
sequences, H query heads and G key/value heads of this tensor-parallel rank, D dimensions a head.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from bd3_scale.attention.dispatch import block_attention
from bd3_scale.model.rotary import apply_rotary
from bd3_scale.model.rows import RowContext, by_rank, by_stream


class QKVLinear(ColumnParallelLinear):
    """megatron's projection to query, key and value, of which some rows may need no query."""

    def forward(self, hidden: Tensor, num_queries: int, kv_rows: slice) -> tuple[Tensor, Tensor | None]:
        """Query, key and value of the first `num_queries` rows, and key and value alone of the others.

        kv_rows: which features of a head group are key and value; a weight's are [G, features of a group, hidden].
        """
        full = self._project(hidden[:num_queries], self.weight, self.bias)
        if num_queries == hidden.shape[0]:
            return full, None
        weight = self.weight.unflatten(0, (-1, kv_rows.stop))[:, kv_rows].flatten(0, 1)
        bias = None if self.bias is None else self.bias.unflatten(0, (-1, kv_rows.stop))[:, kv_rows].flatten()
        return full, self._project(hidden[num_queries:], weight, bias)

    def _project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_with_grad_accumulation_and_async_allreduce(
            hidden,
            weight,
            bias,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.allreduce_dgrad,
            sequence_parallel=self.sequence_parallel,
            tp_group=self.tp_group,
        )


class CoreAttention(nn.Module):
    """The mask of block diffusion, given as spans (DESIGN §4.1) in place of megatron's mask tensor.

    `backend`: see `bd3_scale.attention.backends.choose_backend`.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, *, backend: str, pg_collection: Any, **_: Any
    ) -> None:
        super().__init__()
        # Layers are numbered from one through all pipeline stages; generation runs on one stage.
        self.layer = layer_number - 1
        self.backend = backend
        self.context_group: ProcessGroup = pg_collection.cp

    def forward(self, q_NBHD: Tensor, k_NBGD: Tensor, v_NBGD: Tensor, rows: RowContext) -> Tensor:
        """Attention output [query rows, B, H·D]; clean keys are written to the cache of `rows`, if there is one."""
        if self.context_group.size() > 1:
            k_NBGD, v_NBGD = gather_keys(k_NBGD, v_NBGD, rows, self.context_group)
        q, k, v = (x.transpose(0, 1) for x in (q_NBHD, k_NBGD, v_NBGD))
        if rows.cache is not None:
            assert not any(rows.cache.lengths)
            assert rows.num_noisy == 0
            rows.cache.write(self.layer, k, v)
        # Noisy keys gathered from all ranks stand where clean keys would.
        gathered = self.context_group.size() > 1 and not rows.has_clean
        num_noisy = 0 if gathered else rows.num_noisy
        out = block_attention(q, k, v, rows.spans, num_noisy=num_noisy, backend=self.backend)
        return out.transpose(0, 1).flatten(2)


def gather_keys(k_NBGD: Tensor, v_NBGD: Tensor, rows: RowContext, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """This rank's noisy keys and values, then the clean ones of the whole sequence, gathered in one collective.

    Its backward scatters the summed gradients. Noisy keys are seen by their own block alone, which is on this rank; in
    MDLM, where a block is the sequence and there is no clean stream, they are gathered instead.
    """
    own = k_NBGD.shape[0] // rows.num_streams * rows.num_noisy if rows.has_clean else 0
    mine = torch.cat([k_NBGD[own:], v_NBGD[own:]], dim=2)
    everyone = gather_from_sequence_parallel_region(mine, group=group)
    # Every rank holds an early and a late range, see `zigzag_ranges`.
    early, late = everyone.unflatten(0, (group.size(), 2, -1)).unbind(1)
    k, v = torch.cat([early, late.flip(0)]).flatten(0, 1).chunk(2, dim=2)
    return torch.cat([k_NBGD[:own], k]), torch.cat([v_NBGD[:own], v])


class BlockDiffusionSelfAttention(SelfAttention):
    """megatron's projections, q/k norm and sharding; rotary angles from explicit positions; no bias on the output."""

    def __init__(self, config: TransformerConfig, *, recompute_core: bool, **kwargs: Any) -> None:
        # megatron has one switch for the biases of attention and MLP; here it is the MLP's.
        config = copy.copy(config)
        config.add_bias_linear = False
        super().__init__(config=config, **kwargs)
        self.recompute_core = recompute_core

    def forward(self, hidden_NBX: Tensor, rows: RowContext, num_queries: int) -> Tensor:
        """hidden_NBX: [N, B, hidden]; only the first `num_queries` rows, whole streams, need an output."""
        queries_a_group = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        head_size = self.hidden_size_per_attention_head
        kv_rows = slice(queries_a_group * head_size, (queries_a_group + 2) * head_size)
        qkv, kv = self.linear_qkv(hidden_NBX, num_queries, kv_rows)
        if self.recompute_core and torch.is_grad_enabled():
            out = checkpoint(self._attend, qkv, kv, rows, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self._attend(qkv, kv, rows)
        return self.linear_proj(out)[0]

    def _attend(self, qkv: Tensor, kv: Tensor | None, rows: RowContext) -> Tensor:
        """Everything between the projections: split, norm, rotate, attend."""
        ranks = self.world_size if self.config.sequence_parallel else 1
        query_streams = rows.num_streams if kv is None else rows.num_noisy
        qkv = by_stream(qkv, query_streams, ranks)
        qkv = qkv.unflatten(2, (self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head))
        # One split, whose backward writes each gradient once; three slices would add up three gradients of the whole.
        query, key, value = (part.flatten(2, 3) for part in qkv.split([qkv.shape[3] - 2, 1, 1], dim=3))
        if kv is not None:
            kv = by_stream(kv, rows.num_streams - query_streams, ranks)
            kv = kv.unflatten(2, (self.num_query_groups_per_partition, 2, -1))
            more_key, more_value = kv.unbind(3)
            key, value = torch.cat([key, more_key]), torch.cat([value, more_value])
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        query, key = apply_rotary(query, rows.rotary), apply_rotary(key, rows.rotary)
        return by_rank(self.core_attention(query, key, value, rows), query_streams, ranks)
