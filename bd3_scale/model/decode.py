"""The forward of one block against a cache, for generation: the layers' weights without megatron-core's modules.

Those cost more Python than a block of a small model costs arithmetic. That both compute the same is tested
(`tests/model/test_transformer.py`, on tensor-parallel ranks in `tests/integration`).

Legend: B sequences, L tokens of a block, X hidden size, G key/value heads of this rank, D dimensions a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bd3_scale.attention.dispatch import decode_attention
from bd3_scale.model.kv_cache import KVCache


@torch.no_grad()
def decode_block(
    decoder: Any, hidden_BLX: Tensor, rotary: Tensor, cache: KVCache, group: dist.ProcessGroup, wanted_BL: Tensor | None
) -> Tensor:
    """What `decoder` makes of the embeddings of a block that sees the cached prefix and itself, [B, L, X], or [M, X] of
    the places `wanted_BL` alone, past whose keys the last layer has nothing to compute for others. The keys are written
    behind the prefix.

    rotary: cos and sin [2, B, L, 1, D]; group: of the ranks that split the matrices.
    """
    config = decoder.config
    assert not config.sequence_parallel
    cos, sin = rotary
    half = cos.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)

    def rotate(x: Tensor) -> Tensor:
        return x * cos + x.roll(half, -1) * sin

    def summed(x: Tensor) -> Tensor:
        if group.size() > 1:
            dist.all_reduce(x, group=group)
        return x

    for number, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attention, layer.mlp
        projection = attention.linear_qkv
        qkv = F.linear(layer.input_layernorm.forward(hidden_BLX), projection.weight, projection.bias)
        groups, size = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        qkv = qkv.unflatten(2, (groups, -1, size))
        query, key, value = qkv[:, :, :, :-2].flatten(2, 3), qkv[:, :, :, -2], qkv[:, :, :, -1]
        if attention.q_layernorm is not None:
            query, key = attention.q_layernorm.forward(query), attention.k_layernorm.forward(key)
        keys, values, lengths = cache.write(number, rotate(key), value)
        backend = attention.core_attention.backend
        out = decode_attention(rotate(query), keys, values, lengths=lengths, backend=backend)
        out = out.flatten(2)
        if wanted_BL is not None and number == len(decoder.layers) - 1:
            hidden_BLX, out = hidden_BLX[wanted_BL], out[wanted_BL]
        hidden_BLX = hidden_BLX + summed(F.linear(out, attention.linear_proj.weight))
        wide = F.linear(layer.pre_mlp_layernorm.forward(hidden_BLX), mlp.linear_fc1.weight, mlp.linear_fc1.bias)
        if config.gated_linear_unit:
            gate, wide = wide.chunk(2, -1)
            wide = config.activation_func(gate) * wide
        else:
            wide = config.activation_func(wide)
        narrow = summed(F.linear(wide, mlp.linear_fc2.weight))
        hidden_BLX = hidden_BLX + (narrow if mlp.linear_fc2.bias is None else narrow + mlp.linear_fc2.bias)
    normed: Tensor = decoder.final_layernorm.forward(hidden_BLX)
    return normed
