"""What an optimiser step is computed on: every sequence's block size, noise and mask, as the recipe has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bd3_scale.attention.spans import make_spans
from bd3_scale.data.batch import Batch
from bd3_scale.data.corrupt import Context, corrupt, mask_noise, next_tokens
from bd3_scale.diffusion.interval import Interval
from bd3_scale.diffusion.noise import Noise, draw_block_sizes, draw_copies
from bd3_scale.diffusion.schedule import Schedule
from bd3_scale.model.rows import ModelInputs
from bd3_scale.recipe.schema import DiffusionRecipe, Recipe


def training_schedule(diffusion: DiffusionRecipe, interval: Interval | None = None) -> Schedule:
    """What training draws masks with, in a searched `interval` or the recipe's; evaluation has the whole of [0, 1].

    ValueError: see `Schedule`.
    """
    low, high = interval or (diffusion.mask_rate_low, diffusion.mask_rate_high)
    return Schedule(
        name=diffusion.noise_schedule,
        low=low,
        high=high,
        num_steps=diffusion.noise_steps,
        weights=diffusion.loss_weights,
        clip_masked_share=diffusion.clip_masked_share,
    )


def step_inputs(
    recipe: Recipe,
    micro: Batch,
    step: int,
    *,
    intervals: Mapping[int, Interval],
    mask_id: int,
    device: torch.device,
    context: Context,
) -> ModelInputs:
    """A micro-batch of the optimiser step that follows `step` finished ones, the same on every layout.

    intervals: the searched interval of a block size, where there is one.
    """
    diffusion = recipe.diffusion
    placed: dict[str, Any] = {"device": device, "context": context}
    if diffusion.objective == "next_token":
        return next_tokens(micro, **placed)
    sizes = diffusion.block_sizes_at(step)
    kinds = draw_block_sizes(micro.ids, len(sizes), seed=recipe.seed, epoch=micro.epoch)
    block_size = sizes[0] if len(sizes) == 1 else torch.tensor(sizes)[kinds]
    block_start = make_spans(micro.document_start, block_size)[1]
    rows = [(kinds == kind).nonzero()[:, 0] for kind in range(len(sizes))]
    drawn = [
        draw_copies(
            block_start[own],
            copies=diffusion.noisy_copies,
            schedule=training_schedule(diffusion, intervals.get(size)),
            seed=recipe.seed,
            epoch=micro.epoch,
            sample_ids=micro.ids[own],
            step=step,
            slots=micro.slots[own],
            shown=micro.shown[own],
            global_batch_size=recipe.train.global_batch_size,
        )
        for size, own in zip(sizes, rows, strict=True)
        if len(own)
    ]
    order = torch.cat(rows).argsort()
    noises = [_joined(copies, order) for copies in zip(*drawn, strict=True)]
    inputs = corrupt(micro, noises, block_size, mask_id=mask_id, **placed)
    if len(sizes) > 1:
        inputs = replace(inputs, kinds=kinds.to(device, non_blocking=True))
    if std := diffusion.mask_noise_at(step):
        noise = mask_noise(micro, std, copies=diffusion.noisy_copies, seed=recipe.seed, **placed)
        inputs = replace(inputs, mask_noise=noise)
    return inputs


def _joined(parts: Sequence[Noise], order: Tensor) -> Noise:
    """The noise of several groups of sequences, put in `order`."""
    fields = zip(*((part.masked, part.mask_rate, part.weight) for part in parts), strict=True)
    return Noise(*(torch.cat(field)[order] for field in fields))
