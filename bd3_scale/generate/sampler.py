"""Block by block with a KV cache of the clean prefix; inside a block, by one of the rules of `unmasking`.

Blocks are aligned to position 0 including the prompt, whose tail is clean tokens of the first generated block.

Shapes: B samples, L' tokens a block, M of them, V vocabulary entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3_scale.attention.spans import make_spans
from bd3_scale.generate.unmasking import Rule, Unmasking
from bd3_scale.model.kv_cache import KVCache
from bd3_scale.model.transformer import BlockDiffusionTransformer

ENTROPY_WINDOW = 256
SUBWORD_ENTROPY = 4.0
SMALLEST_SUBWORD_VOCABULARY = 1024


@dataclass(frozen=True)
class Sample:
    """`tokens`: generated ids, without the prompt and without EOS; `nfe`: denoising passes; `cache_passes`: apart
    from them.
    """

    tokens: list[int]
    stopped_by: str
    nfe: int
    cache_passes: int


@torch.no_grad()
def generate(
    model: BlockDiffusionTransformer,
    prompt: list[int],
    *,
    block_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    min_entropy: float | None = None,
    unmasking: Rule = "first-hitting",
    steps: int | None = None,
    threshold: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, limit: None,
) -> Sample:
    """Continue `prompt` by up to `max_new_tokens` tokens; all tensor-parallel ranks call it alike (collective).

    A denoising pass unmasks one token of the block at a place drawn uniformly (`first-hitting`), or the most confident
    ones, in at most `steps` passes a block (`static`; by default one a token), and all above `threshold` with them
    (`dynamic`; by default 0.9); see `bd3_scale.generate.unmasking`. At temperature 0 the most likely tokens are taken.

    Sampling stops after the block that holds EOS, or when the entropy of the last 256 tokens falls below `min_entropy`
    nats: by default 4 (the paper's rule), and 0 for vocabularies of bytes or characters, whose text never reaches 4.
    `progress` is told after each block how many tokens there are, and the limit.

    Raises:
        ValueError: a prompt with ids outside the clean vocabulary, a limit below 1, an unknown rule, or options that it
            does not take or that are out of their range.
    """
    _check(model, prompt, max_new_tokens, temperature)
    how = Unmasking.make(unmasking, block_size, steps, threshold)
    denoise = _first_hitting if how.rule == "first-hitting" else functools.partial(_by_confidence, how=how)
    model.eval()
    eos, mask_id = model.vocabulary.eos_id, model.vocabulary.mask_id
    device = next(model.parameters()).device
    random = np.random.Generator(np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)))
    whole = len(prompt) // block_size * block_size
    cache = model.new_cache(1, -(-(len(prompt) + max_new_tokens) // block_size) * block_size)
    cache_passes = 0
    if whole:
        clean = torch.tensor([prompt[:whole]], device=device)
        spans = make_spans(torch.zeros_like(clean, dtype=torch.int32), block_size)
        model.prefill(clean, torch.arange(whole, device=device)[None], spans, cache)
        cache_passes += 1
    if min_entropy is None:
        min_entropy = SUBWORD_ENTROPY if model.vocabulary.size >= SMALLEST_SUBWORD_VOCABULARY else 0.0
    generated: list[int] = []
    nfe = 0
    while True:
        start = cache.length
        given = (prompt + generated)[start:]
        block = torch.tensor([given + [mask_id] * (block_size - len(given))], device=device)
        positions = torch.arange(start, start + block_size, device=device)[None]
        nfe += denoise(model, block, positions, cache, random, temperature)
        generated = (generated + block[0, len(given) :].tolist())[:max_new_tokens]
        progress(len(generated), max_new_tokens)
        if eos in generated:
            return Sample(generated[: generated.index(eos)], "eos", nfe, cache_passes)
        if len(generated) == max_new_tokens:
            return Sample(generated, "length", nfe, cache_passes)
        if _entropy(generated) < min_entropy:
            return Sample(generated, "entropy", nfe, cache_passes)
        model.prefill(block, positions, None, cache)
        cache_passes += 1


def _check(model: BlockDiffusionTransformer, prompt: list[int], max_new_tokens: int, temperature: float) -> None:
    vocabulary = model.vocabulary
    bad = [i for i in prompt if not 0 <= i < vocabulary.size or i == vocabulary.mask_id]
    if bad:
        raise ValueError(
            f"the prompt holds ids {bad[:5]} that are no clean tokens of this vocabulary of {vocabulary.size}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: give at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: give 0 (most likely token) or above")


def _first_hitting(
    model: BlockDiffusionTransformer,
    block: Tensor,
    positions: Tensor,
    cache: KVCache,
    random: np.random.Generator,
    temperature: float,
) -> int:
    """Fill the masked tokens of `block` [1, L'] in place, one a pass; returns the number of passes."""
    order = (block[0] == model.vocabulary.mask_id).nonzero()[:, 0].tolist()
    random.shuffle(order)
    for place in order:
        logits_V = model.decode(block, positions, cache)[0, place]
        block[0, place] = _draw_tokens(logits_V[None], random.random(1), temperature)[0][0]
    return len(order)


def _by_confidence(
    model: BlockDiffusionTransformer,
    block: Tensor,
    positions: Tensor,
    cache: KVCache,
    random: np.random.Generator,
    temperature: float,
    *,
    how: Unmasking,
) -> int:
    """Fill the masked tokens of `block` [1, L'] in place; returns the number of passes."""
    passes = 0
    while (masked := block[0] == model.vocabulary.mask_id).any():
        logits_LV = model.decode(block, positions, cache)[0]
        drawn, confidence = _draw_tokens(logits_LV, random.random(len(masked)), temperature)
        block[0] = torch.where(how.choose(confidence, masked, passes), drawn, block[0])
        passes += 1
    return passes


def _draw_tokens(logits_MV: Tensor, uniforms_M: NDArray[np.float64], temperature: float) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits / temperature) by inverse transform, in float64: tokens [M] and their probabilities [M].

    At temperature 0 the most likely tokens, and their probabilities at temperature 1.
    """
    probabilities = (logits_MV.double() / (temperature or 1.0)).softmax(-1)
    if temperature == 0:
        tokens = logits_MV.argmax(-1, keepdim=True)
    else:
        cumulative = probabilities.cumsum(-1)
        # Where forbidden ids end the vocabulary their cumulative sum repeats the last allowed one's, which the search
        # never passes.
        target = torch.from_numpy(uniforms_M).to(cumulative.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)
    return tokens[:, 0], probabilities.gather(-1, tokens)[:, 0]


def _entropy(tokens: list[int]) -> float:
    """Entropy in nats of the frequencies of the last 256 tokens; infinite before there are as many."""
    if len(tokens) < ENTROPY_WINDOW:
        return float("inf")
    share = np.unique(tokens[-ENTROPY_WINDOW:], return_counts=True)[1] / ENTROPY_WINDOW
    return float(-(share * np.log(share)).sum())
