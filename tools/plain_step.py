"""The rival of `bench_step.py`: a block diffusion step as a plain script would take it, in eager PyTorch.

Both streams through every layer, attention under a dense mask, logits of every noisy row, torch's AdamW: what the
published code does, without its adaptive norms and dropout, which would only cost it time.

Legend: B sequences, L tokens, X hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3_scale.attention.reference import dense_mask
from bd3_scale.attention.spans import make_spans
from bd3_scale.recipe.schema import Recipe


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, ffn, bias=False), nn.Linear(ffn, hidden, bias=False)

    def forward(self, x_BNX: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(self.norm1(x_BNX)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (x * rotary[0] + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * rotary[1] for x in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x_BNX = x_BNX + self.out(attended.transpose(1, 2).flatten(2))
        return x_BNX + self.down(F.gelu(self.up(self.norm2(x_BNX)), approximate="tanh"))


class PlainStep:
    """`step(tokens, masked, mask_rate)` is one optimiser step on [B, L]."""

    def __init__(self, recipe: Recipe, vocabulary: int, mask_id: int, device: torch.device) -> None:
        model, length = recipe.model, recipe.data.seq_len
        self.mask_id = mask_id
        self.embedding = nn.Embedding(vocabulary, model.hidden_size, device=device)
        self.layers = nn.ModuleList(
            Layer(model.hidden_size, model.num_attention_heads, model.ffn_hidden_size).to(device)
            for _ in range(model.num_layers)
        )
        self.norm = nn.LayerNorm(model.hidden_size, device=device)
        self.head = nn.Linear(model.hidden_size, vocabulary, bias=False, device=device)
        spans = make_spans(torch.zeros(1, length, dtype=torch.int32), recipe.diffusion.block_size)
        self.mask = dense_mask(spans, num_noisy=1, num_keys=length, clean_queries=True)[:, None].to(device)
        angle = torch.arange(length)[:, None] * 1e4 ** -(torch.arange(0, model.head_size, 2) / model.head_size)
        angle = torch.cat([angle, angle], -1).repeat(2, 1).to(device)
        self.rotary = angle.cos(), angle.sin()
        parts = nn.ModuleList([self.embedding, self.layers, self.norm, self.head])
        self.parameters = list(parts.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def step(self, tokens: Tensor, masked: Tensor, mask_rate: Tensor) -> float:
        length = tokens.shape[1]
        x_BNX = self.embedding(torch.cat([tokens.masked_fill(masked, self.mask_id), tokens], 1))
        for layer in self.layers:
            x_BNX = layer(x_BNX, self.mask, self.rotary)
        logits = self.head(self.norm(x_BNX[:, :length])).float()
        log_probs = logits.index_fill(-1, torch.tensor([self.mask_id], device=logits.device), float("-inf"))
        nll = F.cross_entropy(log_probs.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        loss = torch.where(masked, nll / mask_rate, 0.0).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return float(loss)
