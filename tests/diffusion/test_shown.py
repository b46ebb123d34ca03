"""Check that shown tokens are never masked and do not count when the masks of the others are drawn."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.attention.spans import make_spans
from bd3_scale.diffusion.noise import draw_copies, draw_noise
from bd3_scale.diffusion.schedule import Schedule

LENGTH = 24


def starts(block_size: int, sequences: int = 1) -> torch.Tensor:
    return make_spans(torch.zeros(sequences, LENGTH, dtype=torch.int32), block_size)[1]


def noise_of(shown: torch.Tensor | None, block_size: int, **how):
    schedule = Schedule(**{"low": 0.0, "high": 1.0, **how})
    ids = torch.arange(1 if shown is None else len(shown))
    return draw_noise(starts(block_size, len(ids)), seed=1, epoch=0, sample_ids=ids, schedule=schedule, shown=shown)


@given(st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH), st.sampled_from([1, 3, 8, LENGTH]), st.booleans())
@settings(max_examples=60)
def test_what_is_shown_is_not_masked_and_nothing_shown_changes_nothing(flags, block_size, clip):
    shown = torch.tensor([flags])
    how = {"low": 0.3, "high": 0.8, "clip_masked_share": clip}
    noise = noise_of(shown, block_size, **how)
    assert not (noise.masked & shown).any()
    plain, none = noise_of(None, block_size, **how), noise_of(torch.zeros_like(shown), block_size, **how)
    assert torch.equal(plain.masked, none.masked)
    assert torch.equal(plain.mask_rate, none.mask_rate)
    full = noise_of(shown, block_size, low=1.0, high=1.0)
    assert torch.equal(full.masked, ~shown), "every token masked: all but those that are shown"


@given(st.lists(st.booleans(), min_size=LENGTH // 4, max_size=LENGTH // 4))
@settings(max_examples=40)
def test_blocks_with_something_to_mask_take_one_stratum_each_whatever_lies_between(blocks):
    shown = torch.tensor(np.repeat(blocks, 4))[None]
    rates = noise_of(shown, 4).mask_rate[0, ::4].numpy()[~np.array(blocks)]
    assert sorted((rates * len(rates)).astype(int)) == list(range(len(rates)))


@given(st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH))
@settings(max_examples=40)
def test_the_masked_share_is_that_of_the_tokens_which_can_be_masked(flags):
    shown = torch.tensor([flags])
    noise = noise_of(shown, 8, low=0.25, high=0.75, clip_masked_share=True)
    for first in range(0, LENGTH, 8):
        own = ~shown[0, first : first + 8]
        count, masked = int(own.sum()), int(noise.masked[0, first : first + 8].sum())
        if any(0.25 * count <= k <= 0.75 * count for k in range(count + 1)):
            assert 0.25 * count <= masked <= 0.75 * count


@given(st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH))
@settings(max_examples=20)
def test_two_complementary_copies_mask_each_other_token_once(flags):
    shown = torch.tensor([flags])
    how = {"seed": 1, "epoch": 0, "sample_ids": torch.tensor([5]), "step": 3, "slots": torch.tensor([0])}
    one, other = draw_copies(
        starts(4), copies=2, schedule=Schedule(low=0.2, high=0.8), shown=shown, global_batch_size=1, **how
    )
    assert torch.equal(one.masked ^ other.masked, ~shown)
