"""What a step of the training loop is computed on: the block size, objective and noise that the recipe has for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data.batch import Batch
from bd3_scale.data.manifest import Manifest
from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.train.loop import Run, _corrupt

LENGTH = 32
DATA = Manifest(
    vocabulary=Vocabulary(size=258, eos_id=256, mask_id=257),
    tokenizer_hash="",
    seq_len=LENGTH,
    document_multiple=32,
    holdout=0.0,
    seed=1,
    empty_documents=0,
    sources=(),
    train=None,
    validation=None,
)
BATCH = Batch(
    ids=torch.arange(2),
    slots=torch.arange(2),
    epoch=0,
    tokens=torch.arange(2 * LENGTH).view(2, LENGTH),
    document_start=torch.zeros(2, LENGTH, dtype=torch.int32),
    positions=torch.arange(LENGTH).expand(2, -1),
    counted=torch.ones(2, LENGTH, dtype=torch.bool),
)


@pytest.fixture(scope="module")
def inputs_of(groups):
    def make(step: int, **diffusion: object):
        recipe = Recipe.model_validate(
            {
                "name": "r",
                "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 16},
                "diffusion": {"block_size": 8} | diffusion,
                "data": {"path": "d", "seq_len": LENGTH},
                "train": {"steps": 20, "global_batch_size": 2, "micro_batch_size": 2},
            }
        )
        return _corrupt(Run(recipe, DATA, "", groups, Path()), BATCH, step)

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
