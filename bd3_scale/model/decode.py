"""The forward of one block against a cache, for generation: the layers' weights without megatron-core's modules.

Those cost more Python than a block of a small model costs arithmetic. That both compute the same is tested
(`tests/model/test_transformer.py`, on tensor-parallel ranks in `tests/integration`).

Legend: B sequences, L tokens of a block, X hidden size, G key/value heads of this rank, D dimensions a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_scale.attention.dispatch import decode_attention
from bd3_scale.model.kv_cache import KVCache


@torch.no_grad()
def decode_block(
    decoder: Any, hidden_BLX: Tensor, rotary: Tensor, cache: KVCache, group: dist.ProcessGroup, wanted_BL: Tensor | None
) -> Tensor:
    """What the cache's layers and the norm of `decoder` make of the embeddings of a block that sees the cached prefix
    and itself, [B, L, X], or [M, X] of the places `wanted_BL` alone, past whose keys the last layer has nothing to
    compute for others. The keys are written behind the prefix.

    rotary: cos and sin [2, B, L, 1, D]; group: of the ranks that split the matrices.
    """
    cos, sin = rotary[:, :, :, None]
    half = cos.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)

    def summed(x: Tensor) -> Tensor:
        if group.size() > 1:
            dist.all_reduce(x, group=group)
        return x

    for number, layer in enumerate(cache.layers):
        qkv = layer.qkv(layer.norms[0](hidden_BLX)).unflatten(2, (layer.groups, -1, cos.shape[-1]))
        unturned, value = qkv[:, :, :, :-1], qkv[:, :, :, -1]
        if layer.head_norms is not None:
            query_norm, key_norm = layer.head_norms
            unturned = torch.cat([query_norm(unturned[:, :, :, :-1]), key_norm(unturned[:, :, :, -1:])], 3)
        turned = torch.addcmul(unturned * cos, unturned.roll(half, -1), sin)
        query, key = turned[:, :, :, :-1].flatten(2, 3), turned[:, :, :, -1]
        keys, values, lengths = cache.write(number, key, value)
        out = decode_attention(query, keys, values, lengths=lengths, backend=layer.backend).flatten(2)
        if wanted_BL is not None and number == len(cache.layers) - 1:
            hidden_BLX, out = hidden_BLX[wanted_BL], out[wanted_BL]
        hidden_BLX = hidden_BLX + summed(layer.out(out))
        narrow = summed(layer.narrow(layer.wide(layer.norms[1](hidden_BLX))))
        hidden_BLX = hidden_BLX + (narrow if layer.narrow_bias is None else narrow + layer.narrow_bias)
    normed: Tensor = decoder.final_layernorm.forward(hidden_BLX)
    return normed
