"""Draw noise by counters: which tokens are masked is a pure function of seed, epoch, sample and draw.

There is no generator with a state. A sample gets the same noise on every layout of ranks, micro-batches and workers,
nothing is broadcast or checkpointed, and a resumed run masks exactly what the first run would have masked.

Random bits are Philox4x64-10 (Salmon et al., SC 2011), computed by `numpy.random.Philox`. Only its raw stream is used:
numpy promises that stream for ever, but may change how it makes floats or permutations from it (NEP 19).

- Key: (seed, epoch). Noise levels that are stratified over a global batch use (seed, step). In a mixture each data set
  has a key of its own, which is combined with the seed by exclusive or: samples of equal ids get different noise.
- Counter words: (index // 4, draw, sample id, purpose). Philox gives four numbers for each counter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3_scale.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Noise:
    """The masks of a batch.

    masked: bool [B, L].
    mask_rate: float32 [B, L], the probability with which each token's block was masked.
    weight: float32 [B, L], the weight that a masked token has in the loss; it has no meaning where no token is masked.
    """

    masked: Tensor
    mask_rate: Tensor
    weight: Tensor


def concatenate(parts: Sequence[Noise], order: Tensor) -> Noise:
    """Concatenate the noise of several groups of sequences, then put the sequences in `order`, int64 [B]."""
    fields = zip(*((part.masked, part.mask_rate, part.weight) for part in parts), strict=True)
    return Noise(*(torch.cat(field)[order] for field in fields))


class _Purpose(IntEnum):
    """The last counter word, which keeps the streams of one sample apart.

    The numbers are part of every run's noise: add new ones, never change one.
    """

    MASK = 0
    BLOCK_ORDER = 1
    BLOCK_LEVEL = 2
    BATCH_ORDER = 3
    BATCH_LEVEL = 4
    EMBEDDING = 5
    MASK_COUNT = 6
    BLOCK_SIZE = 7


def draw_noise(
    block_start: Tensor,
    *,
    seed: int,
    epoch: int | Tensor,
    sample_ids: Tensor,
    schedule: Schedule,
    source_keys: Tensor | None = None,
    step: int | None = None,
    slots: Tensor | None = None,
    global_batch_size: int | None = None,
    draw: int = 0,
    num_draws: int = 1,
    shown: Tensor | None = None,
) -> Noise:
    """Draw the masks of a batch on the host; they do not depend on how the global batch is split.

    Args:
        block_start: int [B, L], the second row of the spans.
        seed: of the run.
        epoch: of all sequences, or int64 [B].
        sample_ids: int [B], each sequence's number in its data set.
        schedule: maps noise levels to mask rates.
        source_keys: int64 [B], the key of each sequence's data set in a mixture (default: 0).
        step, slots, global_batch_size: given together, in training: finished steps, each sequence's index in the
            global batch (int [B]), and the size of the global batch.
        draw, num_draws: number of this draw, of so many on the same text.
        shown: bool [B, L], tokens that are never masked and do not count as tokens of their block (default: none).

    Noise levels are stratified, which lowers the variance of the loss (MDLM and BD3-LM use antithetic levels in the
    same way). Let a sequence have K blocks with something to mask. Each K-th of [0, 1] gives one level, in random
    order: t_b = (π(b) + u_b) / K. The permutation π keeps a block's index from determining its noise. A sequence that
    is one block (MDLM) has nothing to stratify within, so training stratifies its level over the global batch; without
    `step`, in evaluation, its level is a plain uniform draw.

    Draw d of `num_draws` rotates every level by d / num_draws within [0, 1). This stratifies a block's levels over the
    draws and leaves each of them uniform (Cranley & Patterson, 1976).

    ValueError: `draw` outside [0, num_draws).
    """
    if not 0 <= draw < num_draws:
        raise ValueError(f"draw {draw} of {num_draws}: give 0 <= draw < num_draws")
    starts = block_start.numpy(force=True)
    num_sequences, seq_len = starts.shape
    begins = starts == np.arange(seq_len)
    maskable = np.ones(starts.shape, np.bool_) if shown is None else ~shown.numpy(force=True)
    batch_levels = np.empty(0)
    if step is not None:
        assert slots is not None
        assert global_batch_size is not None
        all_levels = _levels(global_batch_size, (seed, step), 0, _Purpose.BATCH_ORDER, _Purpose.BATCH_LEVEL)
        batch_levels = all_levels[slots.numpy(force=True)]
    masked = np.empty(starts.shape, dtype=np.bool_)
    rates = np.empty(starts.shape, dtype=np.float32)
    keys = _keys(seed, epoch, source_keys, num_sequences)
    for row, (key, sample_id) in enumerate(zip(keys, sample_ids.tolist(), strict=True)):
        block, num_blocks = _maskable_blocks(begins[row], maskable[row])
        if begins[row].sum() == 1 and step is not None:
            levels = batch_levels[row, None]
        else:
            levels = _levels(num_blocks, key, sample_id, _Purpose.BLOCK_ORDER, _Purpose.BLOCK_LEVEL)
        block_rates = schedule.mask_rate((levels + draw / num_draws) % 1.0)
        rates[row] = block_rates[block]
        uniform = _uniform(seq_len, key, sample_id, _Purpose.MASK, draw)
        # Compare in float64. In float32 `uniform` would be rounded, a token would be masked with a probability that
        # differs from the rate that the loss divides by, and the bound would be biased.
        masked[row] = (uniform < rates[row].astype(np.float64)) & maskable[row]
        if schedule.clip_masked_share and (can_mask := maskable[row]).any():
            count_uniform = _uniform(num_blocks, key, sample_id, _Purpose.MASK_COUNT, draw)
            masked[row, can_mask] = _clip_shares(
                masked[row, can_mask], block[can_mask], uniform[can_mask], block_rates, count_uniform, schedule
            )
    return Noise(torch.from_numpy(masked), torch.from_numpy(rates), torch.from_numpy(schedule.weight(rates)))


def _maskable_blocks(begins: NDArray[np.bool_], maskable: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """Number the blocks that have something to mask: return each token's block number, int64 [L], and their count.

    The number has no meaning in a block without a maskable token. The count is at least 1.
    """
    block = np.cumsum(begins) - 1
    has_any = np.zeros(block[-1] + 1, np.bool_)
    has_any[block[maskable]] = True
    return np.maximum(np.cumsum(has_any) - 1, 0)[block], max(1, int(has_any.sum()))


def _clip_shares(
    masked: NDArray[np.bool_],
    block: NDArray[np.int64],
    uniform: NDArray[np.float64],
    block_rates: NDArray[np.float32],
    count_uniform: NDArray[np.float64],
    schedule: Schedule,
) -> NDArray[np.bool_]:
    """Return the masks of one sequence with each block's share of masks inside the schedule's interval.

    The number of masks of a block comes from its truncated binomial distribution, by inversion of the cumulative
    distribution. Then the tokens with the smallest `uniform` are masked, a uniform subset of that size.

    masked, block, uniform [L]: the untruncated draw, each token's block, and random numbers that order the tokens of a
    block; block_rates, count_uniform [K].
    """
    lengths = np.bincount(block)
    counts = np.arange(lengths.max() + 1)
    probability = _binomial(counts, lengths[:, None], block_rates.astype(np.float64)[:, None])
    cumulative = np.cumsum(np.where(schedule.admits(lengths[:, None], counts), probability, 0.0), axis=1)
    possible = cumulative[:, -1] > 0
    share = cumulative / np.where(possible, cumulative[:, -1], 1.0)[:, None]
    drawn = (share <= count_uniform[:, None]).sum(1)
    rank = np.empty(len(block), dtype=np.int64)
    rank[np.lexsort((uniform, block))] = np.arange(len(block)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.where(possible[block], rank < drawn[block], masked)


def _binomial(counts: NDArray[np.int64], lengths: NDArray[np.int64], rate: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability of each count of masks among a block's tokens, [K, max + 1]; 0 above the block's length.

    Computed through logarithms: the factorials of a block of more than 170 tokens exceed a float64.
    """
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, lengths.max() + 1)))])
    rest = np.maximum(lengths - counts, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_masked = np.where(counts > 0, counts * np.log(rate), 0.0)
        log_shown = np.where(rest > 0, rest * np.log1p(-rate), 0.0)
    log_ways = log_factorial[lengths] - log_factorial[counts] - log_factorial[rest]
    return np.where(counts <= lengths, np.exp(log_ways + log_masked + log_shown), 0.0)


def draw_copies(
    block_start: Tensor, *, copies: int, schedule: Schedule, shown: Tensor | None = None, **how: Any
) -> list[Noise]:
    """Draw the noise of each of `copies` noisy copies that share a clean copy.

    Further arguments are those of `draw_noise`; a copy is a draw of it.

    Two copies are complementary where the schedule is mirrored (linear with low + high = 1): the second copy masks
    exactly the tokens that the first shows. Each token is then learnt once, and the second copy's rate 1 − p is
    distributed as p is, so both are draws of the same schedule. Otherwise the copies are draws whose levels differ by
    1 / copies, modulo 1.
    """
    if copies == 2 and schedule.is_mirrored:
        noise = draw_noise(block_start, schedule=schedule, shown=shown, **how)
        rate = 1.0 - noise.mask_rate
        other = ~noise.masked if shown is None else ~noise.masked & ~shown
        return [noise, Noise(other, rate, torch.from_numpy(schedule.weight(rate.numpy())))]
    return [
        draw_noise(block_start, draw=i, num_draws=copies, schedule=schedule, shown=shown, **how) for i in range(copies)
    ]


def draw_block_sizes(
    sample_ids: Tensor, choices: int, *, seed: int, epoch: int | Tensor, source_keys: Tensor | None = None
) -> Tensor:
    """Draw which of `choices` block sizes each sequence takes, all equally likely; int64 [B] in [0, choices)."""
    keys = _keys(seed, epoch, source_keys, len(sample_ids))
    drawn = [
        _uniform(1, key, sample, _Purpose.BLOCK_SIZE)[0] for key, sample in zip(keys, sample_ids.tolist(), strict=True)
    ]
    return torch.from_numpy((np.array(drawn) * choices).astype(np.int64))


def draw_embedding_noise(
    sample_ids: Tensor,
    seq_len: int,
    *,
    seed: int,
    epoch: int | Tensor,
    copies: int,
    rows: int,
    source_keys: Tensor | None = None,
) -> Tensor:
    """Draw which noise vector each position takes where it is masked; int64 [copies, B, L] in [1, rows)."""
    keys = _keys(seed, epoch, source_keys, len(sample_ids))
    drawn = [
        [
            _uniform(seq_len, key, sample, _Purpose.EMBEDDING, copy)
            for key, sample in zip(keys, sample_ids.tolist(), strict=True)
        ]
        for copy in range(copies)
    ]
    return torch.from_numpy(1 + (np.array(drawn) * (rows - 1)).astype(np.int64))


def _keys(seed: int, epoch: int | Tensor, source_keys: Tensor | None, count: int) -> list[tuple[int, int]]:
    """Return the Philox key of each sequence."""
    epochs = epoch.tolist() if isinstance(epoch, Tensor) else [epoch] * count
    sources = [0] * count if source_keys is None else source_keys.tolist()
    return [(seed ^ source, sample_epoch) for source, sample_epoch in zip(sources, epochs, strict=True)]


def _levels(count: int, key: tuple[int, int], sample_id: int, order: _Purpose, level: _Purpose) -> NDArray[np.float64]:
    """Draw one noise level from each of `count` equal parts of [0, 1], in random order: (π(i) + u_i) / count."""
    permutation = _uniform(count, key, sample_id, order).argsort(kind="stable")
    return (permutation + _uniform(count, key, sample_id, level)) / count


def _uniform(count: int, key: tuple[int, int], sample_id: int, purpose: _Purpose, draw: int = 0) -> NDArray[np.float64]:
    """Draw float64 [count] in [0, 1), multiples of 2^-53; the first n numbers do not depend on `count`."""
    counter = np.array([0, draw, sample_id, purpose], dtype=np.uint64)
    bits = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=counter).random_raw(count)
    # The upper 53 bits fill the significand of a float64 exactly, so that no number is rounded up to 1.
    return (bits >> np.uint64(11)) * 2.0**-53
