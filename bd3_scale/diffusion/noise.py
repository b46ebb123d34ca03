"""Counter-based noise: which tokens are masked is a pure function of seed, epoch, sample and draw.

Random bits are Philox4x64-10 (Salmon et al., SC 2011) as `numpy.random.Philox` computes it, of which only the raw
stream is used, so that no other part of numpy can change them. The key is (seed, epoch), or (seed, step) for levels
stratified over a global batch; of several data sets that are mixed each has a key of its own, by which the seed is
changed (exclusive or). The counter words are (index // 4, draw, sample id, purpose). Whatever ranks,
micro-batches and workers there are, a sample meets the same noise.
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
    """masked: bool [B, L]; mask_rate: float32 [B, L], the probability with which each token's block was masked;
    weight: float32 [B, L], what a masked token there weighs in the loss, anything where none is.
    """

    masked: Tensor
    mask_rate: Tensor
    weight: Tensor


def joined(parts: Sequence[Noise], order: Tensor) -> Noise:
    """Return the noise of several groups of sequences, put in `order`, int64 [B]."""
    fields = zip(*((part.masked, part.mask_rate, part.weight) for part in parts), strict=True)
    return Noise(*(torch.cat(field)[order] for field in fields))


class _Purpose(IntEnum):
    """Last counter word. The numbers are part of every run's noise: add, never renumber."""

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
    """Masks of a batch on the host, the same however the global batch is split.

    block_start: int [B, L], second row of the spans; sample_ids: int [B], each sequence's number in the data set;
    epoch: of all of them, or int64 [B]; source_keys: int64 [B], of the data set that each is of (default: 0);
    schedule: of the mask rates; shown: bool [B, L], tokens that are never masked, nor counted among those of their
    block (default: none).

    A sequence of K blocks that have something to mask takes one noise level from each K-th of [0, 1], in an order of
    its own: t_b = (π(b) + u_b) / K. In training, a sequence that is a single block does so among its global batch:
    `step`, `slots` (int [B], each sequence's place in the global batch) and `global_batch_size` are given together.
    Without them, in evaluation, its level is its own. Draw d of `num_draws` rotates every level by d / num_draws within
    [0, 1), which stratifies a block's levels over the draws and leaves each uniform (Cranley & Patterson, 1976).

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
        # Compared in float64: a token is masked with exactly the float32 rate that the loss divides by.
        masked[row] = (uniform < rates[row].astype(np.float64)) & maskable[row]
        if schedule.clip_masked_share and (own := maskable[row]).any():
            count_uniform = _uniform(num_blocks, key, sample_id, _Purpose.MASK_COUNT, draw)
            masked[row, own] = _clip_shares(
                masked[row, own], block[own], uniform[own], block_rates, count_uniform, schedule
            )
    return Noise(torch.from_numpy(masked), torch.from_numpy(rates), torch.from_numpy(schedule.weight(rates)))


def _maskable_blocks(begins: NDArray[np.bool_], maskable: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """Return the number of each token's block among those with something to mask, int64 [L], and how many these are.

    Of a block that is shown whole the number means nothing; there is at least one.
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
    """Masks of one sequence, each block's number drawn from its truncated binomial by inversion, then a subset.

    masked, block, uniform [L]: the plain draw, each token's block, and what orders the tokens of a block;
    block_rates, count_uniform [K].
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
    """Return [K, max + 1]: probability of each count of masks among a block's tokens; 0 above its length."""
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
    """Noise of each of `copies` noisy copies that share a clean one; further arguments as for `draw_noise`, but
    the draws are the copies.

    Two copies are complementary where the schedule is mirrored (linear, low + high is 1): what one masks with
    probability p the other shows, and masks the rest with probability 1 − p, from the same interval; each token is
    learnt once. Else they are independent draws whose levels differ by half of [0, 1).
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
    """Return int64 [B] in [0, choices): which block size each sequence takes, all equally likely."""
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
    """Return int64 [copies, B, L] in [1, rows): which noise vector each position takes where it is masked."""
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
    """Philox's key of each sequence."""
    epochs = epoch.tolist() if isinstance(epoch, Tensor) else [epoch] * count
    sources = [0] * count if source_keys is None else source_keys.tolist()
    return [(seed ^ source, its_epoch) for source, its_epoch in zip(sources, epochs, strict=True)]


def _levels(count: int, key: tuple[int, int], sample_id: int, order: _Purpose, level: _Purpose) -> NDArray[np.float64]:
    """Return one noise level from each of `count` equal parts of [0, 1], in random order: (π(i) + u_i) / count."""
    permutation = _uniform(count, key, sample_id, order).argsort(kind="stable")
    return (permutation + _uniform(count, key, sample_id, level)) / count


def _uniform(count: int, key: tuple[int, int], sample_id: int, purpose: _Purpose, draw: int = 0) -> NDArray[np.float64]:
    """float64 [count] in [0, 1), multiples of 2^-53; the first n do not depend on `count`."""
    counter = np.array([0, draw, sample_id, purpose], dtype=np.uint64)
    bits = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=counter).random_raw(count)
    return (bits >> np.uint64(11)) * 2.0**-53
