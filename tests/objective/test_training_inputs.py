"""Check the inputs of a training step: the block size, objective and noise that the recipe sets for it."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data.batch import Batch
from bd3_scale.model.rows import Placement
from bd3_scale.objective import BlockDiffusion, ScoreEntropy, StepKeys, objective_of
from bd3_scale.recipe.schema import DiffusionRecipe, Recipe
from bd3_scale.recipe.vocabulary import Vocabulary
from tests.support.recipes import tiny_recipe

LENGTH = 32
CPU = torch.device("cpu")
BATCH = Batch(
    ids=torch.arange(2),
    slots=torch.arange(2),
    epochs=torch.zeros(2, dtype=torch.int64),
    source_keys=torch.zeros(2, dtype=torch.int64),
    tokens=torch.arange(2 * LENGTH).view(2, LENGTH),
    document_start=torch.zeros(2, LENGTH, dtype=torch.int32),
    positions=torch.arange(LENGTH).expand(2, -1),
    counted=torch.ones(2, LENGTH, dtype=torch.bool),
    shown=torch.zeros(2, LENGTH, dtype=torch.bool),
)


@pytest.fixture(scope="module")
def inputs_of():
    def make(step: int, batch: Batch = BATCH, intervals=MappingProxyType({}), **diffusion: object):
        recipe = Recipe.model_validate(
            tiny_recipe(
                diffusion={"mask_rate_low": 0.0, "mask_rate_high": 1.0} | diffusion,
                data={"seq_len": LENGTH},
                train={"steps": 20, "global_batch_size": 600},
            )
        )
        return objective_of(recipe.diffusion, Vocabulary(size=258, eos_id=256, mask_id=257)).training_inputs(
            batch, StepKeys(step, recipe.seed, 600, intervals), Placement(CPU)
        )

    return make


@given(st.integers(0, 12))
def test_each_step_has_the_blocks_of_its_phase(inputs_of, step: int) -> None:
    schedule = [{"block_size": 1, "steps": 3}, {"block_size": LENGTH, "steps": 4}]
    inputs = inputs_of(step, block_size_schedule=schedule)
    expected = 1 if step < 3 else LENGTH if step < 7 else 8
    _, block_start, block_end = inputs.spans[:, 0].tolist()
    assert block_start == [position // expected * expected for position in range(LENGTH)]
    assert block_end == [start + expected for start in block_start]
    assert inputs.num_streams == (1 if expected == LENGTH else 2), "a block that is the sequence sees no clean tokens"


def test_mask_embeddings_are_disturbed_in_the_first_steps_alone(inputs_of) -> None:
    noise = {"mask_noise_std": 0.5, "mask_noise_steps": 4, "noisy_copies": 2}
    first, third = inputs_of(0, **noise).mask_noise, inputs_of(2, **noise).mask_noise
    assert (first.std, third.std) == (0.5, 0.25)
    assert first.rows.shape == (2, 2 * LENGTH)
    assert first.rows.min() >= 1
    assert len(first.rows.unique()) > LENGTH
    assert inputs_of(4, **noise).mask_noise is None
    assert inputs_of(0).mask_noise is None


def test_next_token_prediction_sees_no_mask(inputs_of) -> None:
    inputs = inputs_of(0, objective="next_token", block_size=1)
    assert torch.equal(inputs.tokens, BATCH.tokens)
    assert inputs.num_noisy == 0
    assert inputs.targets.tolist() == [t for row in BATCH.tokens.tolist() for t in row[1:]]


@pytest.mark.parametrize(
    "how", [{}, {"block_size": 16, "block_size_choices": [4, 8, 16]}, {"mask_noise_std": 0.5, "mask_noise_steps": 4}]
)
def test_each_sequence_has_the_noise_of_its_source_and_epoch(inputs_of, how) -> None:
    """Check two sequences of the same number in one batch: each has the noise that it has alone."""
    ids = torch.zeros(2, dtype=torch.int64)
    mixed = replace(BATCH, ids=ids, epochs=torch.tensor([0, 3]), source_keys=torch.tensor([0, 2**61]))
    both = inputs_of(0, mixed, **how)
    alone = [inputs_of(0, mixed.take(torch.tensor([row])), **how) for row in range(2)]
    assert torch.equal(both.tokens, torch.cat([one.tokens for one in alone]))
    if both.mask_noise is not None:
        assert torch.equal(both.mask_noise.rows, torch.cat([one.mask_noise.rows for one in alone]))
    for changed in ({"epochs": ids}, {"source_keys": ids}):
        assert not torch.equal(inputs_of(0, replace(mixed, **changed), **how).tokens[1], both.tokens[1])


def many(sequences: int, first: int = 0) -> Batch:
    """Return copies of one sequence under other ids."""
    ids = torch.arange(first, first + sequences)
    return Batch(
        ids=ids,
        slots=torch.arange(sequences),
        epochs=torch.zeros_like(ids),
        source_keys=torch.zeros_like(ids),
        tokens=BATCH.tokens[:1].expand(sequences, -1),
        document_start=BATCH.document_start[:1].expand(sequences, -1),
        positions=BATCH.positions[:1].expand(sequences, -1),
        counted=BATCH.counted[:1].expand(sequences, -1),
        shown=BATCH.shown[:1].expand(sequences, -1),
    )


def test_each_sequence_draws_a_block_size_that_follows_it(inputs_of) -> None:
    """Check that block sizes are equally frequent and do not depend on the micro-batch of a sequence."""
    sizes = (1, 8, LENGTH)
    whole = inputs_of(0, many(600), block_size_choices=list(sizes))
    drawn = (whole.spans[2] - whole.spans[1])[:, 0]
    kinds = torch.tensor(whole.loss_groups)
    assert torch.equal(drawn, torch.tensor(sizes)[kinds])
    counts = torch.bincount(kinds).tolist()
    assert all(abs(count - 200) < 4 * (600 * 2 / 9) ** 0.5 for count in counts), counts
    part = inputs_of(0, many(7, first=100), block_size_choices=list(sizes))
    assert torch.equal(part.spans, whole.spans[:, 100:107])
    rows = {"masked": part.tokens[:, :LENGTH] == 257, "expected": whole.tokens[100:107, :LENGTH] == 257}
    several = torch.tensor(part.loss_groups) < 2  # levels of single blocks are stratified over the global batch
    assert torch.equal(rows["masked"][several], rows["expected"][several])
    assert part.num_streams == 2, "sequences that are one block keep clean rows beside the others"


def test_each_block_size_has_the_interval_that_was_found_for_it(inputs_of) -> None:
    found = {1: (0.9, 1.0), 8: (0.3, 0.4)}
    inputs = inputs_of(
        0, many(400), intervals=found, block_size_choices=[1, 8, 16], mask_rate_low=0.5, mask_rate_high=0.6
    )
    masked = (inputs.tokens[:, :LENGTH] == 257).float().mean(1)
    rate = 1 / inputs.weights
    kinds, of_row = torch.tensor(inputs.loss_groups), inputs.row_loss_groups
    assert torch.equal(of_row, kinds[inputs.head_rows % 400])
    for kind, (low, high) in enumerate([(0.9, 1.0), (0.3, 0.4), (0.5, 0.6)]):
        assert abs(masked[kinds == kind].mean() - (low + high) / 2) < 0.02
        seen = rate[of_row == kind]
        assert low - 1e-6 < seen.min() < low + 0.01
        assert high - 0.01 < seen.max() < high + 1e-6


def test_an_evaluation_takes_the_likelihood_whatever_is_trained_unless_the_loss_bounds_it() -> None:
    class Squared(BlockDiffusion):
        def row_loss(self, nll, log_total):
            return nll.square()

    nll, log_total = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    for kind, is_measured in ((Squared, False), (ScoreEntropy, True)):
        objective = kind(DiffusionRecipe(block_size=8), Vocabulary(size=258, eos_id=256, mask_id=257))
        trained = objective.training_inputs(BATCH, StepKeys(0, 1, None, {}), Placement(CPU)).row_loss
        (draw,) = objective.evaluation_draws(BATCH, 1, always=torch.zeros_like(BATCH.shown), place=Placement(CPU))
        assert trained is not None
        assert trained(nll, log_total).tolist() == objective.row_loss(nll, log_total).tolist()
        measured = draw.inputs.row_loss
        assert (measured is not None) == is_measured
        assert measured is None or measured(nll, log_total).tolist() == objective.row_loss(nll, log_total).tolist()
