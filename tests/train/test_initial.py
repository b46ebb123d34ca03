"""Check whether a training may begin with the weights of another checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_scale.checkpoint.manifest import TOKENIZER, CheckpointManifest
from bd3_scale.data.manifest import Manifest
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.recipe.schema import DataRecipe, DiffusionRecipe, ModelRecipe, Recipe, TrainRecipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.train.resume import check_initial

MODEL = ModelRecipe(num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=16)
BYTES = Vocabulary(size=258, eos_id=256, mask_id=257)
IMPORT = CheckpointManifest(
    step=0,
    name="imported",
    imported_from="elsewhere",
    model=MODEL,
    vocabulary=BYTES.model_copy(update={"rows": 300}),
    precision="fp32",
    max_position_embeddings=64,
    objective="next_token",
    block_size=1,
    states=("master",),
)


def recipe(**model: object) -> Recipe:
    return Recipe(
        name="r",
        model=MODEL.model_copy(update=model),
        diffusion=DiffusionRecipe(block_size=4),
        data=DataRecipe(path="d", seq_len=64),
        train=TrainRecipe(steps=1, global_batch_size=1, micro_batch_size=1),
    )


def data(vocabulary: Vocabulary = BYTES, tokenizer_hash: str | None = None) -> Manifest:
    return Manifest(
        vocabulary=vocabulary,
        tokenizer_hash=tokenizer_hash or load_tokenizer("bytes").hash,
        seq_len=64,
        document_multiple=32,
        holdout=0.0,
        seed=1,
        empty_documents=0,
        sources=(),
        train=None,
        validation=None,
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    load_tokenizer("bytes").save(tmp_path / TOKENIZER)
    return tmp_path


def test_the_same_model_and_tokeniser_pass_whatever_initialisation_and_rows(checkpoint: Path) -> None:
    check_initial(checkpoint, IMPORT, recipe(init_std=0.5), data())


def test_every_difference_is_named(checkpoint: Path) -> None:
    other = Vocabulary(size=258, eos_id=255, mask_id=257)
    with pytest.raises(ValueError, match="does not fit") as caught:
        check_initial(checkpoint, IMPORT, recipe(num_layers=2, qk_norm=False), data(other))
    for words in ("model.num_layers is 2, the checkpoint has 1", "model.qk_norm is False", "eos_id=255"):
        assert words in str(caught.value)


def test_another_tokeniser_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="is not the one that the data was prepared with"):
        check_initial(checkpoint, IMPORT, recipe(), data(tokenizer_hash="0" * 64))
