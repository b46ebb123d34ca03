"""A checkpoint measured on the held-out split of its data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bd3_scale.checkpoint.manifest import TOKENIZER
from bd3_scale.checkpoint.model import open_model
from bd3_scale.data.manifest import check_tokenizer, load_manifest
from bd3_scale.data.stream import held_out_batches
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.evaluate.nelbo import evaluate_nelbo
from bd3_scale.evaluate.unigram import unigram_perplexity
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.schema import ParallelRecipe

EVALUATION_BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """`nelbo` and its standard errors in nats a token; `exact`: block size 1, where it is the likelihood and no bound.

    `bits_per_byte` is None where only a part of the split was measured.
    """

    checkpoint: str
    step: int
    block_size: int
    exact: bool
    sequences: int
    tokens: int
    draws: int
    nelbo: float
    noise_standard_error: float | None
    text_standard_error: float | None
    perplexity: float
    bits_per_byte: float | None
    unigram_perplexity: float


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    data_path: str | None = None,
    sequences: int | None = None,
    draws: int = 4,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluation:
    """NELBO perplexity of the held-out split, over `draws` of the noise, beside the unigram model's.

    Args:
        data_path: prepared data with the checkpoint's tokeniser; default: what the run was trained on.
        sequences: only the first so many.
        progress: told after each batch how many sequences of how many are done on this rank.

    Raises:
        ValueError: a damaged checkpoint, data without a held-out split, another tokeniser, or counts below 1.
    """
    if draws < 1 or (sequences is not None and sequences < 1):
        raise ValueError(f"draws is {draws} and sequences {sequences}: give at least 1")
    with open_model(checkpoint) as (model, manifest, groups):
        recipe = manifest.recipe.data
        if data_path is not None:
            recipe = recipe.model_copy(update={"path": data_path, "remote": None, "cache_limit": None})
        data = load_manifest(recipe.path, recipe.remote)
        check_tokenizer(data, load_tokenizer(checkpoint / TOKENIZER))
        alone = manifest.recipe.model_copy(update={"data": recipe, "parallel": ParallelRecipe()})
        check_recipe(alone, world_size=1, document_multiple=data.document_multiple)
        if data.validation is None:
            raise ValueError(f"{recipe.path} has no held-out split: prepare it with --holdout above 0")
        total = min(sequences or data.validation.sequences, data.validation.sequences)
        share = {"dp_rank": groups.dp.rank(), "dp_size": groups.dp.size(), "sequences": total}
        finished = 0

        def advance(count: int) -> None:
            nonlocal finished
            finished += count
            progress(finished, -(-total // groups.dp.size()))

        block_size = manifest.recipe.diffusion.block_size
        estimate = evaluate_nelbo(
            [model],
            held_out_batches(recipe, data, batch_size=EVALUATION_BATCH, **share),
            groups,
            block_size=block_size,
            draws=draws,
            progress=advance,
        )
        whole = {"dp_rank": 0, "dp_size": 1, "sequences": total}
        unigram = unigram_perplexity(
            held_out_batches(recipe, data, batch_size=EVALUATION_BATCH, **whole), data.vocabulary.size
        )
    bits_per_byte = None
    if total == data.validation.sequences:
        bits_per_byte = estimate.nelbo * estimate.num_tokens / math.log(2) / data.validation.text_bytes
    return Evaluation(
        checkpoint=str(checkpoint),
        step=manifest.step,
        block_size=block_size,
        exact=block_size == 1,
        sequences=total,
        tokens=estimate.num_tokens,
        draws=estimate.num_draws,
        nelbo=estimate.nelbo,
        noise_standard_error=estimate.noise_standard_error,
        text_standard_error=estimate.text_standard_error,
        perplexity=estimate.perplexity,
        bits_per_byte=bits_per_byte,
        unigram_perplexity=unigram,
    )
