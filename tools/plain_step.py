"""The rival of `bench_step.py`: a block diffusion step as the published model takes it, in eager PyTorch.

Both streams go through every layer, attention is under a dense mask, every noisy row gets logits; norms are adaptive
(of a constant, as without time conditioning), with gates and dropout 0.1 on what each half of a layer adds.

Legend: B sequences, L tokens, N rows, X hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3_scale.attention.reference import dense_mask
from bd3_scale.attention.spans import make_spans
from bd3_scale.recipe.schema import Recipe

CONDITIONING, DROPOUT = 128, 0.1


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden, bias=False), nn.LayerNorm(hidden, bias=False)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)
        self.modulation = nn.Linear(CONDITIONING, 6 * hidden)

    def forward(self, x_BNX: Tensor, conditioning: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(conditioning)[:, None].chunk(6, -1)
        normed = self.norm1(x_BNX) * (1 + scale1) + shift1
        q, k, v = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (x * rotary[0] + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * rotary[1] for x in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x_BNX = x_BNX + gate1 * F.dropout(self.out(attended.transpose(1, 2).flatten(2)), DROPOUT)
        normed = self.norm2(x_BNX) * (1 + scale2) + shift2
        hidden = self.down(F.gelu(self.up(normed), approximate="tanh"))
        return x_BNX + gate2 * F.dropout(hidden, DROPOUT)


class PlainStep(nn.Module):
    """`step(tokens, masked, mask_rate)` is one optimiser step on [B, L]."""

    def __init__(self, recipe: Recipe, vocabulary: int, mask_id: int) -> None:
        super().__init__()
        model, length = recipe.model, recipe.data.seq_len
        self.mask_id = mask_id
        self.embedding = nn.Embedding(vocabulary, model.hidden_size)
        self.layers = nn.ModuleList(
            Layer(model.hidden_size, model.num_attention_heads, model.ffn_hidden_size) for _ in range(model.num_layers)
        )
        self.norm = nn.LayerNorm(model.hidden_size, bias=False)
        self.modulation = nn.Linear(CONDITIONING, 2 * model.hidden_size)
        self.head = nn.Linear(model.hidden_size, vocabulary)
        spans = make_spans(torch.zeros(1, length, dtype=torch.int32), recipe.diffusion.block_size)
        self.register_buffer("mask", dense_mask(spans, num_noisy=1, num_keys=length, clean_queries=True)[:, None])
        angle = torch.arange(length)[:, None] * 1e4 ** -(torch.arange(0, model.head_size, 2) / model.head_size)
        angle = torch.cat([angle, angle], -1).repeat(2, 1)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4)

    def step(self, tokens: Tensor, masked: Tensor, mask_rate: Tensor) -> float:
        length = tokens.shape[1]
        conditioning = torch.zeros(len(tokens), CONDITIONING, device=tokens.device)
        x_BNX = self.embedding(torch.cat([tokens.masked_fill(masked, self.mask_id), tokens], 1))
        for layer in self.layers:
            x_BNX = layer(x_BNX, conditioning, self.mask, (self.cos, self.sin))
        shift, scale = self.modulation(conditioning)[:, None].chunk(2, -1)
        logits = self.head(self.norm(x_BNX[:, :length]) * (1 + scale) + shift)
        logits[..., self.mask_id] = float("-inf")
        log_probs = logits.float() - logits.float().logsumexp(-1, keepdim=True)
        nll = -log_probs.gather(-1, tokens[..., None])[..., 0]
        loss = torch.where(masked, nll / mask_rate, 0.0).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        return float(loss)
