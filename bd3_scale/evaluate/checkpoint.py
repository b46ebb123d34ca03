"""A checkpoint measured on the held-out split of its data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bd3_scale.checkpoint.manifest import TOKENIZER, CheckpointManifest
from bd3_scale.checkpoint.model import open_model
from bd3_scale.data.manifest import check_tokenizer, load_manifest
from bd3_scale.data.stream import held_out_batches
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.evaluate.nelbo import counted_tokens, evaluate_nelbo, is_exact
from bd3_scale.evaluate.unigram import unigram_perplexity
from bd3_scale.recipe.checks import check_block_size
from bd3_scale.recipe.schema import DataRecipe, Recipe

EVALUATION_BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """`nelbo` and its standard errors in nats a token; `exact`: it is the likelihood and no bound, see `is_exact`.

    `bits_per_byte` is None where only a part of the split was measured, or not its documents' first tokens.
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
        recipe = data_recipe(manifest, data_path)
        data = load_manifest(recipe.path, recipe.remote)
        check_tokenizer(data, load_tokenizer(checkpoint / TOKENIZER))
        diffusion = manifest.recipe.diffusion
        check_block_size(diffusion.block_size, recipe, data.document_multiple)
        if data.validation is None:
            raise ValueError(f"{recipe.path} has no held-out split: prepare it with --holdout above 0")
        total = min(sequences or data.validation.sequences, data.validation.sequences)
        share = {"dp_rank": groups.dp.rank(), "dp_size": groups.dp.size(), "sequences": total}
        finished = 0

        def advance(count: int) -> None:
            nonlocal finished
            finished += count
            progress(finished, -(-total // groups.dp.size()))

        estimate = evaluate_nelbo(
            [model],
            held_out_batches(recipe, data, batch_size=EVALUATION_BATCH, **share),
            groups,
            diffusion=diffusion,
            draws=draws,
            progress=advance,
        )
        whole = {"dp_rank": 0, "dp_size": 1, "sequences": total}
        batches = held_out_batches(recipe, data, batch_size=EVALUATION_BATCH, **whole)
        unigram = unigram_perplexity((counted_tokens(batch, diffusion) for batch in batches), data.vocabulary.size)
    bits_per_byte = None
    if total == data.validation.sequences and diffusion.objective == "block_diffusion":
        bits_per_byte = estimate.nelbo * estimate.num_tokens / math.log(2) / data.validation.text_bytes
    return Evaluation(
        checkpoint=str(checkpoint),
        step=manifest.step,
        block_size=diffusion.block_size,
        exact=is_exact(diffusion),
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


def data_recipe(manifest: CheckpointManifest, data_path: str | None) -> DataRecipe:
    """What the run was trained on, or other prepared data. ValueError: there is neither."""
    trained_on = manifest.recipe.data if isinstance(manifest.recipe, Recipe) else None
    if data_path is None:
        if trained_on is None:
            raise ValueError("an imported model was trained on no data here: name some that are prepared, with --data")
        return trained_on
    if trained_on is not None:
        return trained_on.model_copy(update={"path": data_path, "remote": None, "cache_limit": None})
    return DataRecipe(path=data_path, seq_len=load_manifest(data_path).seq_len)
