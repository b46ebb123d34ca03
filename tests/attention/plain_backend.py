"""Register a backend as a user would add one: PyTorch's attention under a dense mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_scale.attention.backends import Backend
from bd3_scale.registry import attention_backends

NAME = "test_plain"


@attention_backends.register(NAME)
class PlainBackend(Backend):
    def obstacle(self, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
        return f"it is for heads of less than 1,000 channels, not {head_dim}" if head_dim >= 1000 else None

    def block_attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, num_noisy: int, scale: float) -> Tensor:
        doc_start, block_start, block_end = spans.unsqueeze(-1)
        key = torch.arange(spans.shape[2])
        own = (block_start <= key) & (key < block_end)
        nothing = torch.zeros_like(own)
        rows = [
            torch.cat(
                [*(own if c == copy else nothing for c in range(num_noisy)), (doc_start <= key) & (key < block_start)],
                -1,
            )
            for copy in range(num_noisy)
        ]
        rows.append(torch.cat([nothing] * num_noisy + [(doc_start <= key) & (key < block_end)], -1))
        return attend(q, k, v, torch.cat(rows, 1)[:, : q.shape[1], : k.shape[1]], scale)

    def decode_attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
        seen = torch.full((q.shape[0],), k.shape[1]) if lengths is None else lengths
        mask = (torch.arange(k.shape[1]) < seen[:, None])[:, None].expand(-1, q.shape[1], -1)
        return attend(q, k, v, mask, scale)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask[:, None], scale=scale, enable_gqa=True).transpose(1, 2)
