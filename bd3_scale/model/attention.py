"""Self-attention over `noisy ⊕ clean` rows, in megatron-core's layer.

Shapes: S rows (noisy copies of L positions, then the clean ones), B sequences, H query heads and G key/value heads of
this tensor-parallel rank, D dimensions a head.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from bd3_scale.attention.dispatch import block_attention, decode_attention
from bd3_scale.model.kv_cache import KVCache
from bd3_scale.model.rotary import apply_rotary


class BlockDiffusionCoreAttention(nn.Module):
    """The mask of block diffusion, given as spans (DESIGN §4.1) in place of megatron's mask tensor.

    `backend`: see `bd3_scale.attention.backends.choose_backend`.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *, backend: str, **_: Any) -> None:
        super().__init__()
        # Layers are numbered from one through all pipeline stages; generation runs on one stage.
        self.layer = layer_number - 1
        self.backend = backend

    def forward(
        self, q_SBHD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, spans: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """Attention output [S, B, H·D].

        `spans` int32 [3, B, L]: noisy and clean rows where S is a multiple of L, clean rows alone where S = L (written
        to `cache`, if given, which must be empty). Without spans the rows are one block that sees the whole cache and
        itself.
        """
        q, k, v = (x.transpose(0, 1) for x in (q_SBHD, k_SBGD, v_SBGD))
        if spans is None:
            assert cache is not None
            out = decode_attention(q, *cache.write(self.layer, k, v), backend=self.backend)
        else:
            num_noisy = q.shape[1] // spans.shape[-1] - 1
            if cache is not None:
                assert cache.length == 0
                assert num_noisy == 0
                cache.write(self.layer, k, v)
            out = block_attention(q, k, v, spans, num_noisy=num_noisy, backend=self.backend)
        return out.transpose(0, 1).flatten(2)


class BlockDiffusionSelfAttention(SelfAttention):
    """megatron's projections, q/k norm and sharding; rotary angles from explicit positions; no bias on the output."""

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        # megatron has one switch for the biases of attention and MLP; here it is the MLP's.
        config = copy.copy(config)
        config.add_bias_linear = False
        super().__init__(config=config, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor,
        inference_context: KVCache | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S, B, hidden]; attention_mask the spans; rotary_pos_emb the table of `rotary_table`."""
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        query, key = apply_rotary(query, rotary_pos_emb), apply_rotary(key, rotary_pos_emb)
        return self.linear_proj(self.core_attention(query, key, value, attention_mask, inference_context))
