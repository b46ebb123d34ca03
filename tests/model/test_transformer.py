"""Check that prefill, cached decoding and the two-stream forward of a small model agree, and that the head never
predicts a token that no text contains.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from bd3_scale.attention.spans import make_spans
from bd3_scale.model.build import build_model
from bd3_scale.recipe.schema import ModelRecipe, ParallelRecipe
from bd3_scale.recipe.vocabulary import Vocabulary
from tests.attention import plain_backend
from tests.support.caches import read

LENGTH = 24
VOCABULARY = Vocabulary(size=60, eos_id=0, mask_id=57)


SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48, "init_std": 0.3}


def build(groups, **choices):
    shape = ModelRecipe(num_layers=2, **SHAPE)
    how = {"dtype": torch.float32, "device": torch.device("cpu"), **choices}
    (built,) = build_model(shape, VOCABULARY, groups, seed=5, **how)
    return built.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model(groups):
    return build(groups)


@pytest.fixture
def clean():
    return torch.randint(0, 57, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def spans_of(clean, block_size):
    return make_spans(torch.zeros_like(clean, dtype=torch.int32), block_size)


def positions_of(clean):
    return torch.arange(clean.shape[1]).expand_as(clean)


@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_cached_blocks_give_the_two_stream_likelihoods(token_nll, model, clean, block_size):
    """Compare the nll of every masked token of every block, from one forward and block by block through the cache."""
    masked = torch.rand(clean.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    noisy = clean.masked_fill(masked, VOCABULARY.mask_id)
    rows = masked.flatten().nonzero()[:, 0]
    two_stream = torch.zeros(clean.shape)
    two_stream[masked] = token_nll(model, noisy, clean, positions_of(clean), spans_of(clean, block_size), rows)
    cache = model.new_cache(2, LENGTH)
    for start in range(0, LENGTH, block_size):
        block = slice(start, start + block_size)
        positions = positions_of(clean)[:, block]
        logits = model.decode(noisy[:, block], positions, cache)
        nll = -logits.log_softmax(-1).gather(-1, clean[:, block, None])[..., 0]
        some = model.decode(noisy[:, block], positions, cache, masked[:, block])
        torch.testing.assert_close(some, logits[masked[:, block]], rtol=1e-5, atol=1e-5)
        expected = two_stream[:, block][masked[:, block]]
        torch.testing.assert_close(nll[masked[:, block]], expected, rtol=1e-5, atol=1e-5)
        model.prefill(clean[:, block], positions, cache)
    assert cache.lengths == [LENGTH] * 2


def test_blocks_at_once_and_one_by_one_give_the_clean_only_forward(model, clean):
    positions = positions_of(clean)
    logits = model.clean_logits(clean, positions, spans_of(clean, 4))
    at_once, stepwise = model.new_cache(2, LENGTH), model.new_cache(2, LENGTH)
    read(model, clean[:, :12], 4, at_once)
    for start in range(0, 12, 4):
        block = slice(start, start + 4)
        expected = logits[:, block]
        torch.testing.assert_close(model.decode(clean[:, block], positions[:, block], stepwise), expected)
        model.prefill(clean[:, block], positions[:, block], stepwise)
    for cache in (at_once, stepwise):
        found = model.decode(clean[:, 12:16], positions[:, 12:16], cache)
        torch.testing.assert_close(found, logits[:, 12:16], rtol=1e-5, atol=1e-5)


def test_block_size_one_is_an_exact_left_to_right_likelihood(token_nll, model, clean):
    """Check that with every token masked, nlls depend neither on the other masks nor on later tokens."""
    spans, positions = spans_of(clean, 1), positions_of(clean)
    everything = torch.full_like(clean, VOCABULARY.mask_id)
    exact = token_nll(model, everything, clean, positions, spans, torch.arange(clean.numel())).view(clean.shape)
    masked = torch.rand(clean.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    some = token_nll(
        model, clean.masked_fill(masked, VOCABULARY.mask_id), clean, positions, spans, masked.flatten().nonzero()[:, 0]
    )
    torch.testing.assert_close(some, exact[masked], rtol=1e-5, atol=1e-5)
    changed = clean.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 57
    other = token_nll(model, everything, changed, positions, spans, torch.arange(clean.numel())).view(clean.shape)
    torch.testing.assert_close(other[:, :10], exact[:, :10], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(other[:, 11:], exact[:, 11:])


def test_documents_do_not_see_each_other(token_nll, model, clean):
    """Check that two documents packed in a sequence have the same nlls as each alone."""
    starts = torch.tensor([0] * 8 + [8] * 16).expand(2, -1)
    masked = torch.zeros_like(clean, dtype=torch.bool)
    masked[:, ::3] = True
    noisy, rows = clean.masked_fill(masked, VOCABULARY.mask_id), masked.flatten().nonzero()[:, 0]
    packed = torch.zeros(clean.shape)
    packed[masked] = token_nll(model, noisy, clean, positions_of(clean) - starts, make_spans(starts.int(), 4), rows)
    for part in (slice(0, 8), slice(8, 24)):
        c, n, m = clean[:, part], noisy[:, part], masked[:, part]
        alone = token_nll(model, n, c, positions_of(c), spans_of(c, 4), m.flatten().nonzero()[:, 0])
        torch.testing.assert_close(packed[:, part][m], alone, rtol=1e-5, atol=1e-5)


def test_the_recipe_chooses_the_attention_of_every_pass(token_nll, model, groups, clean):
    """Check the operators that run: the reference has none, and the CPU's count the pairs of each layer's mask."""
    positions, spans = positions_of(clean), spans_of(clean, 4)

    def run(model):
        cache = model.new_cache(2, LENGTH)
        with FlopCounterMode(display=False) as counter:
            nll = token_nll(model, clean, clean, positions, spans, torch.arange(clean.numel()))
            read(model, clean[:, :20], 4, cache)
            logits = model.decode(clean[:, 20:], positions[:, 20:], cache)
        counts = counter.get_flop_counts()["Global"]
        return torch.cat([nll, logits.flatten()]), {op: n for op, n in counts.items() if "bd3_scale" in str(op)}

    got, by_operator = run(model)
    want, by_none = run(build(groups, attention_backend="reference"))
    finite = want.isfinite()
    torch.testing.assert_close(got[finite], want[finite], rtol=1e-5, atol=1e-5)
    assert not by_none
    by_plug_in, _ = run(build(groups, attention_backend=plain_backend.NAME))
    torch.testing.assert_close(by_plug_in[finite], want[finite], rtol=1e-5, atol=1e-5)
    one_pair = 2 * 4 * 4 * 8  # sequences, heads, two products, head size
    noisy_and_clean, noisy, prefix, block = 24 * 24 + 24 * 4, (24 * 24 + 24 * 4) // 2, 20 * 20, 4 * 24
    assert by_operator == {
        # In the last layer, only noisy rows attend.
        torch.ops.bd3_scale.block_attention: one_pair * (noisy_and_clean + noisy),
        # Each block of a prompt counts the keys of the longest prompt.
        torch.ops.bd3_scale.decode_attention: one_pair * 2 * (prefix + block),
    }


def test_mask_and_padding_ids_have_no_probability(model, clean):
    logits = model.clean_logits(clean, positions_of(clean), spans_of(clean, 4))
    assert logits.shape[-1] == VOCABULARY.padded_size == 128
    impossible = torch.tensor([57, *range(60, 128)])
    assert (logits[..., impossible] == float("-inf")).all()
    assert logits[..., [i for i in range(60) if i != 57]].isfinite().all()


def test_a_cache_that_is_too_short_says_how_long_it_must_be(model, clean):
    cache = model.new_cache(2, 2)
    with pytest.raises(ValueError, match="capacity >= 4"):
        model.decode(clean[:, :4], positions_of(clean)[:, :4], cache)


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({"pipeline": 3, "layers_per_chunk": (1, 4, 3)}, [[[0]], [[1, 2, 3, 4]], [[5, 6, 7]]]),
        ({"pipeline": 2, "virtual_pipeline": 2}, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
    ],
)
def test_layers_are_where_the_recipe_says(groups, parallel, expected):
    recipe, shape = ParallelRecipe(**parallel), ModelRecipe(**SHAPE | {"num_layers": 8})
    how = {"dtype": torch.float32, "device": torch.device("cpu"), "seed": None, "parallel": recipe}
    found = []
    for stage in range(recipe.pipeline):
        of_stage = copy.copy(groups)
        of_stage.pp = dist.ProcessGroup(stage, recipe.pipeline)
        chunks = build_model(shape, VOCABULARY, of_stage, **how)
        found.append([[layer.layer for layer in chunk.decoder.layers] for chunk in chunks])
        assert [hasattr(chunk, "output_layer") for chunk in chunks][-1] == (stage == recipe.pipeline - 1)
        assert hasattr(chunks[0], "embedding") == (stage == 0)
    assert found == expected


def test_the_passes_of_a_block_share_their_rotary_table_and_no_other_does(model, clean):
    cache = model.new_cache(2, LENGTH)
    first = cache.positions([0, 3], 4)
    assert torch.equal(first, torch.tensor([[0, 1, 2, 3], [3, 4, 5, 6]]))
    logits = model.decode(clean[:, :4], first, cache)
    table = cache.rotary[1]
    assert cache.positions([0, 3], 4) is first
    assert torch.equal(model.decode(clean[:, :4], first, cache), logits)
    assert cache.rotary[1] is table
    for starts in ([0, 4], [0, 3]):
        positions = cache.positions(starts, 4)
        alone = model.decode(clean[:, :4], positions.clone(), model.new_cache(2, LENGTH))
        assert torch.equal(model.decode(clean[:, :4], positions, cache), alone)
        assert torch.equal(alone, logits) == (starts == [0, 3])
    assert cache.positions([0, 3], 2).shape == (2, 2)
