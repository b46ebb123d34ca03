"""Define the official bd3lms DiT (its models/dit.py) in plain PyTorch, and the model that its weights fold into."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, HEADS, LAYERS, COND, VOCAB, LENGTH = 24, 3, 2, 10, 19, 12


# Module names, and so those of the state dict, are the official ones.


class LayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(HIDDEN))

    def forward(self, x):
        return F.layer_norm(x, [HIDDEN]) * self.weight


class TimestepEmbedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, COND), nn.SiLU(), nn.Linear(COND, COND))

    def forward(self, sigma):
        angles = sigma[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=sigma.dtype) / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        dim = HIDDEN // HEADS
        self.register_buffer("inv_freq", 1 / (10000 ** (torch.arange(0, dim, 2).float() / dim)))


def rotate(x, inv_freq):
    """Rotate [B, S, H, D] at positions 0 to S − 1; each channel is paired with the one half a head away."""
    angles = torch.outer(torch.arange(x.shape[1]).to(inv_freq), inv_freq).repeat(1, 2)[:, None]
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = LayerNorm()
        self.attn_qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.attn_out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.norm2 = LayerNorm()
        self.mlp = nn.Sequential(
            nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(approximate="tanh"), nn.Linear(4 * HIDDEN, HIDDEN)
        )
        self.adaLN_modulation = nn.Linear(COND, 6 * HIDDEN)

    def forward(self, x, c, mask, halves, inv_freq):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, 2)
        h = self.attn_qkv(self.norm1(x) * (1 + scale_a) + shift_a).unflatten(-1, (3, HEADS, -1))
        q, k = (torch.cat([rotate(half, inv_freq) for half in h[:, :, i].chunk(halves, 1)], 1) for i in (0, 1))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, h[:, :, 2])), attn_mask=mask)
        x = x + gate_a * self.attn_out(out.transpose(1, 2).flatten(2))
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class FinalLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_final = LayerNorm()
        self.linear = nn.Linear(HIDDEN, VOCAB)
        self.adaLN_modulation = nn.Linear(COND, 2 * HIDDEN)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, 2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(VOCAB, HIDDEN))


class DiT(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.vocab_embed = Embedding()
        self.sigma_map = TimestepEmbedder()
        self.rotary_emb = Rotary()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.output_layer = FinalLayer()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.3, generator=generator)

    def forward(self, tokens, mask, halves):
        c = F.silu(self.sigma_map(torch.zeros(len(tokens)).to(self.vocab_embed.embedding)))
        x = self.vocab_embed.embedding[tokens]
        for block in self.blocks:
            x = block(x, c, mask, halves, self.rotary_emb.inv_freq)
        return self.output_layer(x, c)


def attention_mask(block_size):
    """Return the mask [2L, 2L]; rows and columns are first noisy and then clean."""
    block = torch.arange(LENGTH) // block_size
    row, column = block[:, None], block[None]
    noisy = torch.cat([row == column, column < row], 1)
    return torch.cat([noisy, torch.cat([torch.zeros_like(row == column), column <= row], 1)])


def plain_logits(w, model, tokens, mask, halves):
    """Return the logits of a pre-norm transformer with Qwen3's names, LayerNorm, and no adaLN."""
    linear, size = (lambda x, name: F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))), [model.hidden_size]
    half = model.hidden_size // model.num_attention_heads // 2
    inv_freq = model.rope_theta ** -(torch.arange(half).double() / half)

    def norm(x, name):
        return F.layer_norm(x, size, w[f"{name}.weight"], w[f"{name}.bias"], model.norm_eps)

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(model.num_layers):
        to = f"model.layers.{layer}"
        h = norm(x, f"{to}.input_layernorm")
        q, k, v = (linear(h, f"{to}.self_attn.{n}_proj").unflatten(-1, (model.num_attention_heads, -1)) for n in "qkv")
        q, k = (torch.cat([rotate(part, inv_freq) for part in t.chunk(halves, 1)], 1) for t in (q, k))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(2 * half)
        share = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        x = x + linear(torch.einsum("bhij,bjhd->bihd", share, v).flatten(2), f"{to}.self_attn.o_proj")
        h = linear(norm(x, f"{to}.post_attention_layernorm"), f"{to}.mlp.up_proj")
        x = x + linear(F.gelu(h, approximate="tanh"), f"{to}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")
