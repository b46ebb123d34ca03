"""Compare noise with an independent Philox, with its distribution, and over every way to split a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.diffusion.noise import Noise, draw_block_sizes, draw_copies, draw_embedding_noise, draw_noise
from bd3_scale.diffusion.schedule import Schedule

SEED = 2**62 + 12345


def block_starts(num_sequences: int, seq_len: int, block_size: int) -> torch.Tensor:
    position = torch.arange(seq_len)
    return (position - position % block_size).expand(num_sequences, -1)


def draw(
    block_start: torch.Tensor, first_sample: int = 0, *, low: float = 0.0, high: float = 1.0, **changes: object
) -> Noise:
    arguments = {
        "seed": SEED,
        "epoch": 3,
        "sample_ids": torch.arange(first_sample, first_sample + len(block_start)),
        "schedule": Schedule(low=low, high=high),
    }
    return draw_noise(block_start, **(arguments | changes))


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Compute Philox4x64-10 as Salmon et al. (SC 2011) define it, in Python's integers."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    word = 2**64 - 1
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2E7470EE14C6C93, 2**64)
        high1, low1 = divmod(c2 * 0xCA5A826395121157, 2**64)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & word, (k1 + 0xBB67AE8584CAA73B) & word
    return [c0, c1, c2, c3]


def philox_uniforms(key: tuple[int, int], draw: int, sample: int, purpose: int, count: int) -> list[float]:
    # numpy increments the counter before it draws: its first four numbers belong to counter 1.
    words = [w for i in range(1, 2 + count // 4) for w in philox(key, (i, draw, sample, purpose))]
    return [(w >> 11) / 2**53 for w in words[:count]]


def test_philox_known_answers() -> None:
    # The values are from kat_vectors of the Random123 library, philox4x64 with 10 rounds.
    assert philox((0, 0), (0, 0, 0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    ones = 2**64 - 1
    assert philox((ones, ones), (ones, ones, ones, ones)) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 100),
    st.integers(0, 2**40),
    st.integers(0, 3),
    st.sampled_from([1, 3, 8]),
)
@settings(max_examples=25)
def test_noise_is_the_documented_function_of_philox(
    seed: int, epoch: int, sample: int, d: int, block_size: int
) -> None:
    seq_len = 21
    noise = draw(
        block_starts(1, seq_len, block_size),
        seed=seed,
        epoch=epoch,
        sample_ids=torch.tensor([sample]),
        draw=d,
        num_draws=4,
        low=0.25,
        high=0.75,
    )
    num_blocks = math.ceil(seq_len / block_size)
    order = np.argsort(philox_uniforms((seed, epoch), 0, sample, 1, num_blocks))
    offset = philox_uniforms((seed, epoch), 0, sample, 2, num_blocks)
    uniform = philox_uniforms((seed, epoch), d, sample, 0, seq_len)
    for i in range(seq_len):
        level = ((order[i // block_size] + offset[i // block_size]) / num_blocks + d / 4) % 1.0
        rate = np.float32(0.25 + 0.5 * level)
        assert noise.mask_rate[0, i].item() == rate
        assert noise.masked[0, i].item() == (uniform[i] < float(rate))


@given(st.integers(1, 6), st.integers(1, 24), st.sampled_from([1, 5, 24]), st.data())
@settings(max_examples=30)
def test_any_split_of_the_batch_draws_the_same(batch: int, seq_len: int, block_size: int, data: st.DataObject) -> None:
    starts = block_starts(batch, seq_len, block_size)
    placed = {"step": 7, "slots": torch.arange(batch), "global_batch_size": batch}
    whole = draw(starts, 10, **placed)
    order = data.draw(st.permutations(range(batch)))
    cut = data.draw(st.integers(0, batch))
    for part in (list(order[:cut]), list(order[cut:])):
        if part:
            noise = draw(starts[part], **placed | {"sample_ids": torch.tensor(part) + 10, "slots": torch.tensor(part)})
            assert torch.equal(noise.masked, whole.masked[part])
            assert torch.equal(noise.mask_rate, whole.mask_rate[part])


def test_each_sequence_has_the_noise_of_its_own_epoch_and_source() -> None:
    """Check that each sequence's noise is that of the sequence alone; a source without a key counts as the only one."""
    starts, ids = block_starts(4, 64, 8), torch.tensor([5, 5, 5, 9])
    epochs, keys = torch.tensor([3, 3, 0, 3]), torch.tensor([0, 2**62 + 5, 0, 0])
    mixed = {"sample_ids": ids, "epoch": epochs, "source_keys": keys}
    noise = draw(starts, **mixed)
    sizes = draw_block_sizes(choices=1000, seed=SEED, **mixed)
    vectors = draw_embedding_noise(seq_len=64, seed=SEED, copies=2, rows=1000, **mixed)
    for row in range(4):
        own = {"sample_ids": ids[row : row + 1], "epoch": int(epochs[row]), "seed": SEED ^ int(keys[row])}
        alone = draw(starts[:1], **own)
        assert torch.equal(noise.masked[row], alone.masked[0])
        assert torch.equal(noise.mask_rate[row], alone.mask_rate[0])
        assert sizes[row] == draw_block_sizes(choices=1000, **own)[0]
        assert torch.equal(vectors[:, row], draw_embedding_noise(seq_len=64, copies=2, rows=1000, **own)[:, 0])
    assert not torch.equal(noise.masked[0], noise.masked[1])
    assert not torch.equal(noise.masked[0], noise.masked[2])


def test_everything_that_should_change_the_noise_does() -> None:
    starts = block_starts(2, 512, 8)
    base = draw(starts)
    others = [
        draw(starts, first_sample=2),
        draw(starts, epoch=4),
        draw(starts, seed=SEED + 1),
        draw(starts, source_keys=torch.tensor([7, 7])),
        draw(starts, draw=1, num_draws=2),
    ]
    for other in others:
        assert not torch.equal(other.mask_rate, base.mask_rate)
        # Independent masks at rates that average 1/2 agree on about as many tokens as they differ in.
        assert 0.35 < (other.masked == base.masked).float().mean() < 0.75
    assert 0.35 < (base.masked[0] == base.masked[1]).float().mean() < 0.75


def chi_square(counts: np.ndarray, expected: float) -> float:
    """Return the chi-square statistic as standard deviations from its mean, for many cells."""
    degrees = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.3, 0.8), (0.45, 0.95), (1.0, 1.0)])
def test_mask_rates_are_uniform_and_masks_follow_them(low: float, high: float) -> None:
    noise = draw(block_starts(200, 100, 3), low=low, high=high)
    rates = noise.mask_rate[:, ::3].flatten().double().numpy()
    assert rates.min() >= np.float32(low)
    assert rates.max() <= np.float32(high)
    if low < high:
        histogram = np.histogram(rates, bins=50, range=(low, high))[0]
        assert chi_square(histogram, len(rates) / 50) < 4
    excess = noise.masked.double() - noise.mask_rate.double()
    deviation = (noise.mask_rate.double() * (1 - noise.mask_rate.double())).sum().sqrt()
    assert abs(excess.sum()) <= 4 * deviation
    assert bool(noise.masked.all()) == (low == 1.0)


@pytest.mark.parametrize("block_size", [1, 4])
def test_levels_are_stratified_within_a_sequence(block_size: int) -> None:
    noise = draw(block_starts(50, 64, block_size))
    levels = noise.mask_rate[:, ::block_size].double().sort(1).values
    num_blocks = 64 // block_size
    assert torch.equal((levels * num_blocks).floor(), torch.arange(num_blocks).expand(50, -1).double())


def test_a_blocks_place_does_not_fix_its_level() -> None:
    num_blocks, num_sequences = 4, 4000
    noise = draw(block_starts(num_sequences, num_blocks, 1))
    stratum = (noise.mask_rate.double() * num_blocks).floor().int().numpy()
    orders = np.unique(stratum, axis=0, return_counts=True)[1]
    assert len(orders) == math.factorial(num_blocks)
    assert chi_square(orders, num_sequences / len(orders)) < 4


def test_single_blocks_are_stratified_over_the_global_batch() -> None:
    batch, seq_len = 16, 4
    starts = block_starts(batch, seq_len, seq_len)
    first_slot = []
    for step in range(400):
        noise = draw(starts, step=step, slots=torch.arange(batch), global_batch_size=batch)
        stratum = (noise.mask_rate[:, 0].double() * batch).floor().int()
        assert stratum.sort().values.tolist() == list(range(batch))
        first_slot.append(stratum[0].item())
    assert chi_square(np.bincount(first_slot, minlength=batch), 400 / batch) < 4


@pytest.mark.parametrize("block_size", [4, 12])
def test_a_blocks_levels_are_stratified_over_evaluation_draws(block_size: int) -> None:
    num_draws = 8
    starts = block_starts(100, 12, block_size)
    levels = torch.stack([draw(starts, draw=d, num_draws=num_draws).mask_rate for d in range(num_draws)]).double()
    spaced = levels.sort(0).values.diff(dim=0)
    torch.testing.assert_close(spaced, torch.full_like(spaced, 1 / num_draws), rtol=0, atol=1e-6)


def test_zero_rate_never_masks_and_one_always_does() -> None:
    assert Schedule().mask_rate(np.array([0.0])).item() == 0.0
    assert Schedule().mask_rate(np.array([1 - 2**-53])).item() == 1.0
    assert draw(block_starts(8, 512, 8), low=1.0, high=1.0).masked.all()


def test_draw_outside_the_number_of_draws_is_refused() -> None:
    with pytest.raises(ValueError, match="draw 2 of 2"):
        draw(block_starts(1, 8, 2), draw=2, num_draws=2)


def copies_of(
    block_start: torch.Tensor, copies: int, *, low: float = 0.0, high: float = 1.0, **changes: object
) -> list[Noise]:
    arguments = {"seed": SEED, "epoch": 3, "sample_ids": torch.arange(len(block_start))}
    arguments["schedule"] = Schedule(low=low, high=high)
    return draw_copies(block_start, copies=copies, **(arguments | changes))


def test_one_copy_is_the_noise() -> None:
    starts = block_starts(4, 64, 8)
    (copy,) = copies_of(starts, 1)
    assert torch.equal(copy.masked, draw(starts).masked)
    assert torch.equal(copy.mask_rate, draw(starts).mask_rate)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.3, 0.7), (0.2, 0.8)])
@pytest.mark.parametrize("block_size", [4, 100])
def test_two_copies_mask_every_token_once_where_the_interval_is_its_own_mirror(
    low: float, high: float, block_size: int
) -> None:
    starts = block_starts(400, 100, block_size)
    placed = {"step": 7, "slots": torch.arange(400), "global_batch_size": 400}
    first, second = copies_of(starts, 2, low=low, high=high, **placed)
    assert torch.equal(first.masked, draw(starts, low=low, high=high, **placed).masked)
    assert torch.equal(first.masked, ~second.masked)
    rates = [copy.mask_rate.double() for copy in (first, second)]
    torch.testing.assert_close(rates[0] + rates[1], torch.ones_like(rates[0]), rtol=0, atol=1e-7)
    for copy, rate in zip((first, second), rates, strict=True):
        # Given the rates, masked / rate has mean 1 and variance (1 − rate) / rate, and tokens are independent.
        weight = torch.where(copy.masked, 1 / rate, 0.0)
        standard_error = ((1 - rate) / rate).sum().sqrt() / rate.numel()
        assert abs(weight.mean() - 1) <= 4 * standard_error
        assert standard_error < 0.05


def test_two_copies_are_independent_draws_of_any_other_interval() -> None:
    low, high = 0.3, 0.8
    starts = block_starts(400, 100, 4)
    copies = copies_of(starts, 2, low=low, high=high)
    for number, copy in enumerate(copies):
        same = draw(starts, low=low, high=high, draw=number, num_draws=2)
        assert torch.equal(copy.masked, same.masked)
        assert torch.equal(copy.mask_rate, same.mask_rate)
    first, second = (copy.mask_rate.double() for copy in copies)
    torch.testing.assert_close((first - second).abs(), torch.full_like(first, (high - low) / 2), rtol=0, atol=1e-6)
    both = (copies[0].masked & copies[1].masked).double()
    expected = first * second
    assert abs((both - expected).sum()) <= 4 * (expected * (1 - expected)).sum().sqrt()
