"""Implement the rivals of `bench_step.py`: training steps in eager PyTorch, written in the usual way.

Block diffusion and masked diffusion (MDLM) follow the published model: both streams of block diffusion go through every
layer, attention has a dense mask, and every noisy row gets logits. Norms are adaptive (of a constant, as without time
conditioning), with gates, and dropout on the output of each half of a layer. Next-token training (AR) is a plain GPT of
the recipe's shape: no adaptive norms, one causal attention, PyTorch's cross-entropy. All use fused AdamW and gradient
clipping; in bf16 they run under autocast with fp32 weights, as the published model does.

Legend: B sequences, L tokens, N rows, X hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3_scale.attention.reference import dense_mask
from bd3_scale.attention.spans import make_spans
from bd3_scale.recipe.schema import ModelRecipe, Recipe

CONDITIONING = 128
# The published model's dropout; without it equal work is compared.
PUBLISHED_DROPOUT = 0.1


class Layer(nn.Module):
    """A layer; `adaptive`: with shifts, scales and gates of a conditioning vector."""

    def __init__(self, model: ModelRecipe, *, adaptive: bool, bias: bool, dropout: float) -> None:
        super().__init__()
        hidden, ffn = model.hidden_size, model.ffn_hidden_size
        self.heads, self.dropout = model.num_attention_heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(hidden, bias=False), nn.LayerNorm(hidden, bias=False)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, ffn, bias=bias), nn.Linear(ffn, hidden, bias=bias)
        self.modulation = nn.Linear(CONDITIONING, 6 * hidden) if adaptive else None

    def forward(
        self, x_BNX: Tensor, conditioning: Tensor, mask: Tensor | None, causal: bool, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        if self.modulation is None:
            x_BNX = x_BNX + self._drop(self._attend(self.norm1(x_BNX), mask, causal, rotary))
            return x_BNX + self._drop(self._mlp(self.norm2(x_BNX)))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(conditioning)[:, None].chunk(6, -1)
        normed = self.norm1(x_BNX) * (1 + scale1) + shift1
        x_BNX = x_BNX + gate1 * self._drop(self._attend(normed, mask, causal, rotary))
        normed = self.norm2(x_BNX) * (1 + scale2) + shift2
        return x_BNX + gate2 * self._drop(self._mlp(normed))

    def _attend(self, x: Tensor, mask: Tensor | None, causal: bool, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        cos, sin = (table.to(q.dtype) for table in rotary)
        q, k = (x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout else x


class PlainStep(nn.Module):
    """`step(tokens, masked, mask_rate)` is one optimiser step on [B, L] of an `objective`: bd3, mdlm or ar."""

    def __init__(self, recipe: Recipe, vocabulary: int, mask_id: int, *, objective: str, dropout: float) -> None:
        super().__init__()
        model, length = recipe.model, recipe.data.seq_len
        self.objective, self.mask_id = objective, mask_id
        self.bf16 = recipe.train.precision == "bf16"
        self.clip = recipe.optimizer.clip_grad_norm
        adaptive = objective != "ar"
        how = {"adaptive": adaptive, "bias": adaptive or model.mlp_bias, "dropout": dropout}
        self.embedding = nn.Embedding(vocabulary, model.hidden_size)
        self.layers = nn.ModuleList(Layer(model, **how) for _ in range(model.num_layers))
        self.norm = nn.LayerNorm(model.hidden_size, bias=False)
        self.modulation = nn.Linear(CONDITIONING, 2 * model.hidden_size) if adaptive else None
        self.head = nn.Linear(model.hidden_size, vocabulary, bias=adaptive or model.head_bias)
        spans = make_spans(torch.zeros(1, length, dtype=torch.int32), recipe.diffusion.block_size)
        mask = dense_mask(spans, num_noisy=1, num_keys=length, clean_queries=True)[:, None]
        self.register_buffer("mask", mask if objective == "bd3" else None)
        angle = torch.arange(length)[:, None] * 1e4 ** -(torch.arange(0, model.head_size, 2) / model.head_size)
        angle = torch.cat([angle, angle], -1).repeat(2 if objective == "bd3" else 1, 1)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)

    def step(self, tokens: Tensor, masked: Tensor, mask_rate: Tensor) -> float:
        """Take a step and return the loss before it, in nats per token; AR ignores masks."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self._next_token_loss(tokens) if self.objective == "ar" else self._nelbo(tokens, masked, mask_rate)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        self.optimizer.step()
        return loss.item()

    def _next_token_loss(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.norm(self._hidden(tokens)[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def _nelbo(self, tokens: Tensor, masked: Tensor, mask_rate: Tensor) -> Tensor:
        length = tokens.shape[1]
        noisy = tokens.masked_fill(masked, self.mask_id)
        x_BNX = self._hidden(torch.cat([noisy, tokens], 1) if self.objective == "bd3" else noisy)
        assert self.modulation is not None
        shift, scale = self.modulation(self._conditioning(tokens))[:, None].chunk(2, -1)
        logits = self.head(self.norm(x_BNX[:, :length]) * (1 + scale) + shift)
        logits[..., self.mask_id] = float("-inf")
        log_probs = logits.float() - logits.float().logsumexp(-1, keepdim=True)
        nll = -log_probs.gather(-1, tokens[..., None])[..., 0]
        return torch.where(masked, nll / mask_rate, 0.0).mean()

    def _hidden(self, rows: Tensor) -> Tensor:
        x_BNX, conditioning = self.embedding(rows), self._conditioning(rows)
        for layer in self.layers:
            x_BNX = layer(x_BNX, conditioning, self.mask, self.objective == "ar", (self.cos, self.sin))
        return x_BNX

    def _conditioning(self, rows: Tensor) -> Tensor:
        return torch.zeros(len(rows), CONDITIONING, device=rows.device)


def obstacles(recipe: Recipe) -> Iterator[str]:
    """Yield the values of a recipe that the rivals do not implement."""
    model = recipe.model
    form = {"activation": "gelu_tanh", "normalization": "layernorm", "qk_norm": False, "norm_bias": False}
    form |= {"attention_bias": False, "tie_embeddings": False, "rope_theta": 1e4, "rope_scaling": None}
    yield from (f"model.{key}={getattr(model, key)}" for key, value in form.items() if getattr(model, key) != value)
    if model.query_groups != model.num_attention_heads:
        yield f"model.num_query_groups={model.query_groups}"
    if recipe.train.micro_batch_size != recipe.train.global_batch_size:
        yield f"train.micro_batch_size={recipe.train.micro_batch_size}, several a step"
