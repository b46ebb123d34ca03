"""BD3-LM in plain PyTorch, written for the tests alone: no megatron, no DeepSpeed, dense masks, dense logits.

Weights come as full tensors under megatron's names; the layers' tensors are stacked along the first axis.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def dense_mask(doc_ids, block_size):
    """[2L, 2L] of one sequence from the definition, by loops: rows and columns are noisy then clean."""
    length = len(doc_ids)
    start = {d: doc_ids.index(d) for d in doc_ids}
    block = [(doc_ids[i], (i - start[doc_ids[i]]) // block_size) for i in range(length)]
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            same_document = doc_ids[i] == doc_ids[j]
            mask[i, j] = same_document and block[i] == block[j]
            mask[i, length + j] = same_document and block[j] < block[i]
            mask[length + i, length + j] = same_document and block[j] <= block[i]
    return mask


def norm(x, w, prefix, recipe):
    weight = w[prefix + "weight"]
    if recipe.normalization == "rmsnorm":
        return x * (x.pow(2).mean(-1, keepdim=True) + recipe.norm_eps).rsqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    out = centred / (centred.pow(2).mean(-1, keepdim=True) + recipe.norm_eps).sqrt() * weight
    return out + w[prefix + "bias"] if recipe.norm_bias else out


def rotate(x, positions, theta):
    """x [B, S, H, D]: complex rotation of (x_i, x_{i + D/2})."""
    half = x.shape[-1] // 2
    angle = positions[..., None].double() / theta ** (torch.arange(half).double() / half)
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, :, None]
    out = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn
    return torch.cat([out.real, out.imag], -1)


def attention(x, w, positions, mask, recipe):
    heads, groups = recipe.num_attention_heads, recipe.num_query_groups or recipe.num_attention_heads
    dim = recipe.head_dim or recipe.hidden_size // heads
    qkv = x @ w["self_attention.linear_qkv.weight"].t()
    if recipe.attention_bias:
        qkv = qkv + w["self_attention.linear_qkv.bias"]
    # megatron groups the rows as q…q k v for every key/value head.
    qkv = qkv.unflatten(-1, (groups, heads // groups + 2, dim))
    q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
    if recipe.qk_norm:
        rms = recipe.model_copy(update={"normalization": "rmsnorm"})
        q = norm(q, w, "self_attention.q_layernorm.", rms)
        k = norm(k, w, "self_attention.k_layernorm.", rms)
    q, k = rotate(q, positions, recipe.rope_theta), rotate(k, positions, recipe.rope_theta)
    k, v = (t.repeat_interleave(heads // groups, 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(dim)
    share = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", share, v).flatten(2) @ w["self_attention.linear_proj.weight"].t()


def mlp(x, w, recipe):
    def linear(name, x):
        bias = w[f"mlp.{name}.bias"] if recipe.mlp_bias else 0
        return x @ w[f"mlp.{name}.weight"].t() + bias

    hidden = linear("linear_fc1", x)
    if recipe.activation == "swiglu":
        gate, up = hidden.chunk(2, -1)
        return linear("linear_fc2", gate * torch.sigmoid(gate) * up)
    return linear("linear_fc2", F.gelu(hidden, approximate="tanh" if recipe.activation == "gelu_tanh" else "none"))


def hidden_states(weights, recipe, tokens, positions, mask, extra=0.0):
    x = weights["embedding.word_embeddings.weight"][tokens] + extra
    for layer in range(recipe.num_layers):
        prefix = "decoder.layers."
        w = {k.removeprefix(prefix): v[layer] for k, v in weights.items() if k.startswith(prefix)}
        x = x + attention(norm(x, w, "input_layernorm.", recipe), w, positions, mask, recipe)
        x = x + mlp(norm(x, w, "pre_mlp_layernorm.", recipe), w, recipe)
    return norm(x, weights, "decoder.final_layernorm.", recipe)


def logits(weights, recipe, vocabulary, hidden):
    head = weights["embedding.word_embeddings.weight" if recipe.tie_embeddings else "output_layer.weight"]
    found = hidden @ head.t() + (weights["output_layer.bias"] if recipe.head_bias else 0)
    allowed = torch.arange(found.shape[-1]) < vocabulary.size
    allowed[vocabulary.mask_id] = False
    return found.masked_fill(~allowed, float("-inf"))


def log_probs(weights, recipe, vocabulary, hidden):
    return logits(weights, recipe, vocabulary, hidden).log_softmax(-1)


def token_loss(weights, recipe, vocabulary, hidden, targets, objective):
    """−log p of each target, or its score entropy, whose scores are exponentials over the number of clean tokens."""
    if objective == "score_entropy":
        log_scores = logits(weights, recipe, vocabulary, hidden) - math.log(vocabulary.size - 1)
        return log_scores.exp().sum(-1) - 1 - log_scores.gather(-1, targets[..., None])[..., 0]
    return -log_probs(weights, recipe, vocabulary, hidden).gather(-1, targets[..., None])[..., 0]


def next_token_loss(weights, recipe, vocabulary, batch):
    """Sum of −log p of every token given those before it in its document, but for its first."""
    mask = torch.stack([dense_mask(row.tolist(), 1) for row in batch["doc_ids"]])
    length = batch["clean"].shape[1]
    hidden = hidden_states(weights, recipe, batch["clean"], batch["positions"], mask[:, length:, length:])
    found = token_loss(weights, recipe, vocabulary, hidden[:, :-1], batch["clean"][:, 1:], "next_token")
    return found[batch["doc_ids"][:, 1:] == batch["doc_ids"][:, :-1]].sum()


def loss(weights, recipe, vocabulary, batch, block_size, objective="block_diffusion"):
    """Mean over noisy copies of the sum over masked tokens of −log p / mask rate, or of their score entropy.

    `batch` has clean, masked and mask_rate [copies, …], doc_ids, positions, and may have mask_noise [copies, B, L, X],
    which is added to the embeddings of masked tokens.
    """
    length = batch["clean"].shape[1]
    mask = torch.stack([dense_mask(row.tolist(), block_size) for row in batch["doc_ids"]])
    positions = batch["positions"].repeat(1, 2)
    total = 0.0
    for copy, (masked, rate) in enumerate(zip(batch["masked"], batch["mask_rate"], strict=True)):
        noisy = torch.where(masked, vocabulary.mask_id, batch["clean"])
        tokens = torch.cat([noisy, batch["clean"]], 1)
        extra = 0.0
        if "mask_noise" in batch:
            extra = F.pad(batch["mask_noise"][copy] * masked[..., None], (0, 0, 0, length))
        hidden = hidden_states(weights, recipe, tokens, positions, mask, extra)[:, :length]
        found = token_loss(weights, recipe, vocabulary, hidden, batch["clean"], objective)
        total = total + torch.where(masked, found / rate, 0.0).sum()
    return total / len(batch["masked"])
