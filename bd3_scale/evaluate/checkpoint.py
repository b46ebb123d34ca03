"""Evaluate a checkpoint on the held-out split of its data, or on other text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.diffusion.interval import LEAST_SEQUENCES, IntervalVariance
from bd3_scale.evaluate.measured_text import MeasuredText, held_out_texts, prepared_texts, texts_in_memory
from bd3_scale.evaluate.nelbo import HeldOut, evaluate_nelbo
from bd3_scale.evaluate.sets import NamedText
from bd3_scale.evaluate.text_statistics import unigram_perplexity
from bd3_scale.generate.source import open_source
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.objective import Objective
from bd3_scale.parallel.groups import ProcessGroups, is_alone, lone_groups
from bd3_scale.recipe.checks import check_block_size

EVALUATION_BATCH = 16
# Of an imported model, where text is measured: what it may take can be far more than anybody measures with.
LONGEST_CONTEXT = 4096


@dataclass(frozen=True)
class Evaluation:
    """The NELBO of one text at one block size, with its standard errors, in nats per token.

    exact: `nelbo` is the negative log-likelihood and not a bound of it.
    text: `held-out`; the source's name if the data has several; or the name of another text.
    context: tokens of a sequence; nothing precedes a sequence.
    padded_nelbo: with the padding of a document's last block counted, see `HeldOut`; None if no block is partly
        padding.
    bits_per_byte: over the UTF-8 bytes of the measured tokens' text.
    trained_on: number of its documents that were in the training data, too; None if unknown, and for the run's own
        split.
    own: the text is the held-out split of the run's own data.
    intervals: the loss's variance under every clipped interval, if requested.
    """

    checkpoint: str
    step: int
    text: str
    block_size: int
    exact: bool
    context: int
    sequences: int
    tokens: int
    draws: int
    nelbo: float
    padded_nelbo: float | None
    noise_standard_error: float | None
    text_standard_error: float | None
    perplexity: float
    bits_per_byte: float
    unigram_perplexity: float
    own: bool
    trained_on: int | None = None
    intervals: tuple[IntervalVariance, ...] | None = None


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    data_path: str | None = None,
    texts: Sequence[NamedText] = (),
    block_sizes: Sequence[int] = (),
    sequences: int | None = None,
    draws: int = 4,
    intervals: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Evaluation]:
    """Return the NELBO perplexity of the held-out split or of `texts`, and the unigram model's for comparison.

    Args:
        data_path: prepared data with the checkpoint's tokeniser; default: the data of the training.
        texts: other text in place of held-out data; all ranks must run on one machine, whose temporary folder they
            share.
        block_sizes: default: the one of the training.
        sequences: how many sequences, from the first; default: all.
        draws: noise draws per sequence.
        intervals: search the clipped interval of mask rates, too.
        progress: called after each batch with the sequences done on this rank and their total.

    Raises:
        ValueError: a damaged checkpoint, data without a held-out split, another tokeniser, text shorter than a block,
            counts below 1, or a search with too little text or of a next-token model.
    """
    if draws < 1 or (sequences is not None and sequences < 1):
        raise ValueError(f"draws is {draws} and sequences {sequences}: give at least 1")
    if texts and data_path is not None:
        raise ValueError("--text measures text in place of held-out data: give either --text or --data")
    with ExitStack() as stack:
        source = stack.enter_context(open_source(checkpoint))
        manifest = source.manifest
        objectives = _objectives(manifest, block_sizes, intervals=intervals)
        model, groups = stack.enter_context(source.load())
        if texts:
            block_sizes = [objective.block_size for objective in objectives]
            measured = prepared_texts(manifest, source.tokenizer(), texts, block_sizes, groups, stack)
        else:
            measured = held_out_texts(source, data_path)
        options: dict[str, Any] = {"sequences": sequences, "draws": draws, "intervals": intervals, "progress": progress}
        evaluations = _evaluations(str(checkpoint), manifest.step, model, groups, measured, objectives, **options)
        if not is_alone(groups):
            dist.barrier()  # rank 0 removes the folder of the texts, which other ranks may still read
    return evaluations


def evaluate_texts(
    name: str,
    model: BlockDiffusionTransformer,
    manifest: CheckpointManifest,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    block_size: int | None = None,
    draws: int = 4,
) -> Evaluation:
    """Evaluate a loaded model in one process; the numbers equal those of `evaluate_checkpoint` of a file of these
    texts.

    name: value for `Evaluation.checkpoint`.
    ValueError: text shorter than a block, or none, an unsuitable block size, or no draw.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: give at least 1")
    texts = [text for text in texts if text.strip()]  # `DocumentReader` skips them, too
    if not texts:
        raise ValueError("there is no text to measure: give at least one that is not empty")
    (objective,) = _objectives(manifest, () if block_size is None else (block_size,))
    text = texts_in_memory(manifest, tokenizer, texts, objective.block_size)
    (evaluation,) = _evaluations(name, manifest.step, model, lone_groups(), [text], [objective], draws=draws)
    return evaluation


def _objectives(
    manifest: CheckpointManifest, block_sizes: Sequence[int], *, intervals: bool = False
) -> list[Objective]:
    """Return the training objective at each block size."""
    trained = manifest.trained_objective()
    if not trained.fills_masks and (intervals or set(block_sizes) - {trained.block_size}):
        raise ValueError(
            "a model that masks nothing has neither blocks nor mask rates: leave out --block-size and --intervals"
        )
    return [trained.at(size) for size in block_sizes or (trained.block_size,)]


def _evaluations(
    name: str,
    step: int,
    model: BlockDiffusionTransformer,
    groups: ProcessGroups,
    measured: Sequence[MeasuredText],
    objectives: Sequence[Objective],
    *,
    draws: int,
    sequences: int | None = None,
    intervals: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Evaluation]:
    """Evaluate each text at each block size (collective)."""
    for objective in objectives:
        for text in measured:
            check_block_size(objective.block_size, text.recipe, text.document_multiple)
    counts = [min(sequences or text.sequences, text.sequences) for text in measured]
    if intervals and min(counts) < LEAST_SEQUENCES:
        raise ValueError(
            f"the interval search has {min(counts)} sequences and needs {LEAST_SEQUENCES}: use more held-out text"
        )
    total, finished = sum(-(-count // groups.dp.size()) for count in counts) * len(objectives), 0

    def advance(count: int) -> None:
        nonlocal finished
        finished += count
        progress(finished, total)

    evaluations = []
    for text, count in zip(measured, counts, strict=True):
        tokens = (objectives[0].counting(batch) for batch in text.batches(count))
        unigram = unigram_perplexity(tokens, text.tokenizer.vocabulary.size)
        num_bytes = text.bytes(count, objectives[0])
        for objective in objectives:
            batches = text.batches(count, dp_rank=groups.dp.rank(), dp_size=groups.dp.size())
            options: dict[str, Any] = {"objective": objective, "draws": draws, "padded": True, "progress": advance}
            held_out = evaluate_nelbo([model], batches, groups, **options)
            result = _evaluation(name, step, text, objective, held_out, unigram, num_bytes)
            evaluations.append(replace(result, intervals=held_out.intervals().variances) if intervals else result)
    return evaluations


def _evaluation(
    name: str,
    step: int,
    text: MeasuredText,
    objective: Objective,
    held_out: HeldOut,
    unigram: float,
    num_bytes: int,
) -> Evaluation:
    estimate = held_out.nelbo
    assert held_out.padded is not None
    return Evaluation(
        checkpoint=name,
        step=step,
        text=text.name,
        block_size=objective.block_size,
        exact=objective.is_exact,
        context=text.recipe.seq_len,
        sequences=estimate.num_sequences,
        tokens=estimate.num_tokens,
        draws=estimate.num_draws,
        nelbo=estimate.nelbo,
        padded_nelbo=None if held_out.padded.nelbo == estimate.nelbo else held_out.padded.nelbo,
        noise_standard_error=estimate.noise_standard_error,
        text_standard_error=estimate.text_standard_error,
        perplexity=estimate.perplexity,
        bits_per_byte=estimate.nelbo * estimate.num_tokens / math.log(2) / max(1, num_bytes),
        unigram_perplexity=unigram,
        own=text.own,
        trained_on=text.trained_on,
    )
