"""Define BD3-LM in plain PyTorch for the tests: no megatron, no DeepSpeed, dense masks, dense logits.

Weights are full tensors under megatron's names. Tensors of all layers are stacked along the first axis; MLPs and
mixtures of experts are stacked separately. The biases of experts are in `mlp.router.expert_bias`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


def dense_mask(doc_ids, block_size):
    """Return the mask [2L, 2L] of one sequence by loops over the definition; rows and columns are noisy, then clean."""
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


def dense_masks(doc_ids, block_size):
    """Return masks [B, 2L, 2L]; sequences with the same documents share one, since loops are slow."""
    sequences = [tuple(row) for row in doc_ids.tolist()]
    known = {sequence: dense_mask(sequence, block_size) for sequence in set(sequences)}
    return torch.stack([known[sequence] for sequence in sequences])


def norm(x, w, prefix, recipe):
    weight = w[prefix + "weight"]
    if recipe.normalization == "rmsnorm":
        return x * (x.pow(2).mean(-1, keepdim=True) + recipe.norm_eps).rsqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    out = centred / (centred.pow(2).mean(-1, keepdim=True) + recipe.norm_eps).sqrt() * weight
    return out + w[prefix + "bias"] if recipe.norm_bias else out


def rotate(x, positions, theta, fraction=1.0):
    """Rotate x [B, S, H, D] as complex numbers (x_i, x_{i + D/2}); only the first `fraction` of pairs is rotated."""
    half, turning = x.shape[-1] // 2, int(x.shape[-1] * fraction) // 2
    angle = positions[..., None].double() / theta ** (torch.arange(half).double() / turning)
    angle[..., turning:] = 0
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
    q, k = (rotate(x, positions, recipe.rope_theta, recipe.rotary_fraction) for x in (q, k))
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


def scores_of(logits, moe):
    return logits.softmax(-1) if moe.score == "softmax" else logits.sigmoid()


def choose(values, moe):
    """Return the experts of a row, best first, by their `values`, a list, and the margin of the choice: how far the
    last accepted expert or group is above the first rejected one.
    """
    size = moe.num_experts // moe.groups
    best_two = [sum(sorted(values[g * size : (g + 1) * size])[-2:]) for g in range(moe.groups)]
    groups = sorted(range(moe.groups), key=lambda g: -best_two[g])
    top_groups = moe.top_groups or moe.groups
    experts = [e for e in range(moe.num_experts) if e // size in groups[:top_groups]]
    experts.sort(key=lambda e: -values[e])
    gaps = [best_two[groups[top_groups - 1]] - best_two[groups[top_groups]]] if top_groups < moe.groups else []
    if moe.top_k < len(experts):
        gaps.append(values[experts[moe.top_k - 1]] - values[experts[moe.top_k]])
    return experts[: moe.top_k], min(gaps, default=math.inf)


def expert_weights(score, chosen, moe):
    """Return the factors of the outputs of the `chosen` experts [T, k], for rows with scores [T, E]."""
    weight = score.gather(-1, chosen)
    if moe.normalize_top_k and moe.score == "softmax":
        weight = weight / weight.sum(-1, keepdim=True)
    elif moe.normalize_top_k and moe.top_k > 1:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return weight * moe.scale


def gated(x, gate, up, down):
    wide = x @ gate.t()
    return (wide * torch.sigmoid(wide) * (x @ up.t())) @ down.t()


def mixture(x, w, moe):
    """Return the mixture's output for rows x [B, S, X] by a loop over the experts, and the routing: logits [B, S, E],
    chosen experts [B, S, k], and the smallest margin.
    """
    rows = x.flatten(0, 1)
    logits = rows.float() @ w["mlp.router.weight"].float().t()
    score = scores_of(logits, moe)
    bias = w.get("mlp.router.expert_bias", torch.zeros(moe.num_experts))
    chosen, gaps = zip(*(choose(values, moe) for values in (score.detach() + bias).tolist()), strict=True)
    chosen = torch.tensor(chosen)
    weight = expert_weights(score, chosen, moe)
    out = torch.zeros(rows.shape)
    for expert in range(moe.num_experts):
        row, place = (chosen == expert).nonzero(as_tuple=True)
        gate, up = w["mlp.experts.linear_fc1.weight"][expert]
        found = gated(rows[row], gate, up, w["mlp.experts.linear_fc2.weight"][expert])
        out = out.index_add(0, row, weight[row, place, None] * found)
    if moe.shared_ffn_hidden_size:
        gate, up = w["mlp.shared_experts.linear_fc1.weight"].chunk(2)
        out = out.to(x.dtype) + gated(rows, gate, up, w["mlp.shared_experts.linear_fc2.weight"])
    return out.view_as(x), (logits.unflatten(0, x.shape[:2]), chosen.unflatten(0, x.shape[:2]), min(gaps))


def of_layer(weights, recipe, layer):
    """Return the weights of one layer, without the layer's prefix."""
    found, dense = {}, recipe.dense_layers
    for key, value in weights.items():
        name = key.removeprefix("decoder.layers.")
        if name == key:
            continue
        if name.startswith(("mlp.router.", "mlp.experts.", "mlp.shared_experts.")):
            found |= {name: value[layer - dense]} if layer >= dense else {}
        elif name.startswith("mlp."):
            found |= {name: value[layer]} if layer < dense else {}
        else:
            found[name] = value[layer]
    return found


def hidden_states(weights, recipe, tokens, positions, mask, extra=0.0, routed=None):
    """Return the last layer's normed output; the routing of each mixture is appended to the list `routed`."""
    x = weights["embedding.word_embeddings.weight"][tokens] + extra
    for layer in range(recipe.num_layers):
        w = of_layer(weights, recipe, layer)
        x = x + attention(norm(x, w, "input_layernorm.", recipe), w, positions, mask, recipe)
        normed = norm(x, w, "pre_mlp_layernorm.", recipe)
        if layer < recipe.dense_layers:
            x = x + mlp(normed, w, recipe)
        else:
            added, how = mixture(normed, w, recipe.moe)
            x = x + added
            if routed is not None:
                routed.append(how)
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
    """Return −log p of each target, or its score entropy, with scores exp(logit) over the number of clean tokens."""
    if objective == "score_entropy":
        log_scores = logits(weights, recipe, vocabulary, hidden) - math.log(vocabulary.size - 1)
        return log_scores.exp().sum(-1) - 1 - log_scores.gather(-1, targets[..., None])[..., 0]
    return -log_probs(weights, recipe, vocabulary, hidden).gather(-1, targets[..., None])[..., 0]


def next_token_loss(weights, recipe, vocabulary, batch, routed=None):
    """Return the sum of −log p of every token but each document's first; `routed` as in `loss`."""
    mask = dense_masks(batch["doc_ids"], 1)
    length = batch["clean"].shape[1]
    passed = []
    hidden = hidden_states(weights, recipe, batch["clean"], batch["positions"], mask[:, length:, length:], 0.0, passed)
    if routed is not None:
        routed.extend(Routed(logits[:, :0], logits, chosen[:, :0], chosen, gap) for logits, chosen, gap in passed)
    found = token_loss(weights, recipe, vocabulary, hidden[:, :-1], batch["clean"][:, 1:], "next_token")
    return found[batch["doc_ids"][:, 1:] == batch["doc_ids"][:, :-1]].sum()


def loss(weights, recipe, vocabulary, batch, block_size, objective="block_diffusion", routed=None):
    """Return the mean over noisy copies of Σ over masked tokens of −log p / mask rate, or of their score entropy.

    `batch` has clean, masked and mask_rate [copies, …], doc_ids, positions, and may have mask_noise [copies, B, L, X],
    which is added to the embeddings of masked tokens. A `Routed` of each mixture of experts, over all copies, is
    appended to the list `routed`.
    """
    length = batch["clean"].shape[1]
    mask = dense_masks(batch["doc_ids"], block_size)
    positions = batch["positions"].repeat(1, 2)
    total, passed = 0.0, []
    for copy, (masked, rate) in enumerate(zip(batch["masked"], batch["mask_rate"], strict=True)):
        noisy = torch.where(masked, vocabulary.mask_id, batch["clean"])
        tokens = torch.cat([noisy, batch["clean"]], 1)
        extra = 0.0
        if "mask_noise" in batch:
            extra = F.pad(batch["mask_noise"][copy] * masked[..., None], (0, 0, 0, length))
        passed.append([])
        hidden = hidden_states(weights, recipe, tokens, positions, mask, extra, passed[-1])[:, :length]
        found = token_loss(weights, recipe, vocabulary, hidden, batch["clean"], objective)
        total = total + torch.where(masked, found / rate, 0.0).sum()
    if routed is not None:
        routed.extend(rows_once(passed, length, has_clean=block_size < length))
    return total / len(batch["masked"])


class Routed(NamedTuple):
    """The routing of one mixture for all noisy copies, one after the other, and then the clean tokens: logits [B, T,
    E], chosen experts [B, T, k], and the smallest margin.
    """

    noisy_logits: torch.Tensor
    clean_logits: torch.Tensor
    noisy_experts: torch.Tensor
    clean_experts: torch.Tensor
    gap: float


def rows_once(passed, length, *, has_clean):
    """Yield, for each mixture, the rows that training routes, from passes of one noisy copy and clean tokens each:
    clean rows count once, and not in the last layer, nor where no noisy token sees one.
    """
    for layer, copies in enumerate(zip(*passed, strict=True), 1):
        logits, experts = ([torch.split(how[i], length, 1) for how in copies] for i in (0, 1))
        clean = slice(length if has_clean and layer < len(passed[0]) else 0)
        yield Routed(
            torch.cat([noisy for noisy, _ in logits], 1),
            logits[0][1][:, clean],
            torch.cat([noisy for noisy, _ in experts], 1),
            experts[0][1][:, clean],
            min(gap for *_, gap in copies),
        )


def load(routed, num_experts):
    """Return how many noisy and clean rows each expert was sent, [layers, 2, E]."""
    streams = [experts for layer in routed for experts in (layer.noisy_experts, layer.clean_experts)]
    return torch.stack([experts.flatten().bincount(minlength=num_experts) for experts in streams]).unflatten(0, (-1, 2))


def balance_losses(routed, moe):
    """Return the auxiliary and the z-loss, without their coefficients: means over sequences, sums over layers."""
    auxiliary, z = [], []
    for layer in routed:
        logits = torch.cat([layer.noisy_logits, layer.clean_logits], 1)
        chosen = torch.cat([layer.noisy_experts, layer.clean_experts], 1)
        for sequence, experts in zip(logits, chosen, strict=True):
            score = scores_of(sequence, moe)
            share = score / score.sum(-1, keepdim=True)
            rows = len(sequence)
            assigned = torch.tensor([(experts == e).sum() for e in range(moe.num_experts)])
            even = moe.num_experts / (moe.top_k * rows**2)
            auxiliary.append(even * sum(assigned[e] * share[:, e].sum() for e in range(moe.num_experts)))
            z.append(sequence.logsumexp(-1).square().mean())
    sequences = len(routed[0].noisy_logits)
    return sum(auxiliary) / sequences, sum(z) / sequences


def moved(bias, counts, moe):
    """Return the biases [layers, E] after a step whose experts were sent `counts` rows [layers, 2, E]."""
    total = counts.sum(1)
    even = total.sum(1, keepdim=True).double() / moe.num_experts
    return bias + moe.bias_update_rate * torch.sign(even - total).float()
