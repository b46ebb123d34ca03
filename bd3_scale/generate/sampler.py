"""Sample continuations of prompts together, from beginning to end; see `denoiser`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.denoiser import Denoiser
from bd3_scale.generate.draft import Draft, Request, Sample
from bd3_scale.model.transformer import BlockDiffusionTransformer


def generate(
    model: BlockDiffusionTransformer,
    prompt: list[int],
    sampling: SamplingConfig,
    *,
    block_size: int,
    window: int | None = None,
    eos_ids: Sequence[int] | None = None,
) -> Sample:
    """Continue one prompt; see `generate_batch`."""
    return generate_batch(model, [prompt], sampling, block_size=block_size, window=window, eos_ids=eos_ids)[0]


def generate_batch(
    model: BlockDiffusionTransformer,
    prompts: Sequence[list[int]],
    sampling: SamplingConfig,
    *,
    block_size: int,
    window: int | None = None,
    eos_ids: Sequence[int] | None = None,
    ends: Callable[[int, list[int]], int | None] = lambda index, tokens: None,
) -> list[Sample]:
    """Continue every prompt, text i with the seed `sampling.seed` + i.

    Args:
        window, eos_ids: see `Request`; default: all tokens, and the vocabulary's EOS.
        ends: called with a text's number and its generated tokens after each block; returns how many of them to keep if
            the text ends there, else None.

    ValueError: see `denoise`.
    """
    eos_ids = (model.vocabulary.eos_id,) if eos_ids is None else eos_ids
    requests = [
        Request(prompt, sampling, sampling.seed + index, eos_ids, window, partial(ends, index))
        for index, prompt in enumerate(prompts)
    ]
    passes = denoise(model, requests, block_size=block_size)
    samples = {draft.index: draft.sample for drafts in passes for draft in drafts if draft.sample is not None}
    return [samples[index] for index in range(len(prompts))]


def denoise(model: BlockDiffusionTransformer, requests: Sequence[Request], *, block_size: int) -> Iterator[list[Draft]]:
    """Yield the texts that have not ended, or have just ended, before the first pass and after each.

    All tensor-parallel ranks call it with equal arguments and iterate to the end (collective).

    Raises:
        ValueError: no request, what `Request.check` refuses, or more steps than the rule allows for this block size.
    """
    if not requests:
        raise ValueError("there is no prompt: give at least one, which may be empty")
    for request in requests:
        request.check(model.vocabulary, block_size)
    capacity = max(request.capacity(block_size) for request in requests)
    denoiser = Denoiser(model, block_size=block_size, slots=len(requests), capacity=capacity)
    for index, request in enumerate(requests):
        denoiser.join(Draft.of(index, request, block_size, model.vocabulary.mask_id))
    while denoiser.reads:
        denoiser.read()
    while active := denoiser.active:
        yield active
        denoiser.leave([draft for draft in active if draft.sample is not None])
        if denoiser.active:
            denoiser.advance()
