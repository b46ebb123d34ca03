"""A checkpoint measured on the held-out split of its data, or on other text."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.data.batch import Batch
from bd3_scale.data.manifest import Manifest, bos_option, check_tokenizer, load_manifest
from bd3_scale.data.memory import packed_texts
from bd3_scale.data.node import load_sources_of_node
from bd3_scale.data.overlap import count_known, hashes_of, read_hashes
from bd3_scale.data.stream import batches_in_order, held_out_batches
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.diffusion.interval import LEAST_SEQUENCES, IntervalVariance
from bd3_scale.evaluate.nelbo import HeldOut, evaluate_nelbo
from bd3_scale.evaluate.sets import NamedText
from bd3_scale.evaluate.yardsticks import counted_bytes, unigram_perplexity
from bd3_scale.generate.source import Source, open_source
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.objective import Objective
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.parallel.groups import ProcessGroups, is_alone, lone_groups
from bd3_scale.recipe.checks import check_block_size
from bd3_scale.recipe.schema import DataRecipe
from bd3_scale.resilience.leftovers import temporary_folder

EVALUATION_BATCH = 16
# Of an imported model, where text is measured: what it may take can be far more than anybody measures with.
LONGEST_CONTEXT = 4096


@dataclass(frozen=True)
class Evaluation:
    """`nelbo` and its standard errors in nats a token; `exact`: it is the likelihood and no bound.

    text: `held-out`, of several sources the name of the one that it is of, or the name of another text. context: tokens
    of a sequence, which begins without any before it.
    padded_nelbo: with what pads the last block of a document counted, see `HeldOut`; None where no block is so.
    bits_per_byte: over the bytes of the text of the measured tokens.
    trained_on: how many of its documents the training had, too; None where nothing tells, and of the run's own split.
    own: it is the held-out split of the run's own data.
    intervals: the loss's variance under every clipped interval, where it was asked for.
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


@dataclass(frozen=True)
class _Measured:
    """Text that is prepared.

    read: `held_out_batches` of it, or what gives the same of samples in memory. sequences: how many there are.
    text_bytes: of its whole text, None where all of it does not count.
    """

    name: str
    recipe: DataRecipe
    document_multiple: int
    tokenizer: Tokenizer
    read: Callable[..., Iterator[Batch]]
    sequences: int
    text_bytes: int | None
    own: bool = False
    trained_on: int | None = None

    @classmethod
    def of_data(cls, name: str, recipe: DataRecipe, data: Manifest, tokenizer: Tokenizer, **more: Any) -> Self:
        """Return the held-out split of prepared data."""
        assert data.validation is not None
        return cls(
            name,
            recipe,
            data.document_multiple,
            tokenizer,
            partial(held_out_batches, recipe, data),
            data.validation.sequences,
            None if data.messages else data.validation.text_bytes,
            **more,
        )

    def batches(self, sequences: int, *, dp_rank: int = 0, dp_size: int = 1) -> Iterator[Batch]:
        return self.read(batch_size=EVALUATION_BATCH, dp_rank=dp_rank, dp_size=dp_size, sequences=sequences)

    def bytes(self, sequences: int, objective: Objective) -> int:
        """Return the UTF-8 bytes of the text of the tokens that count for a model of `objective`."""
        if sequences == self.sequences and objective.predicts_first and self.text_bytes is not None:
            return self.text_bytes
        batches = self.batches(sequences)
        return counted_bytes(batches, self.tokenizer, lambda batch: objective.counting(batch).counted)


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
    """NELBO perplexity of the held-out split or of `texts`, over `draws` of the noise, beside the unigram model's.

    Args:
        data_path: prepared data with the checkpoint's tokeniser; default: what the run was trained on.
        texts: other text in place of held-out data; the machine's ranks share its temporary folder.
        block_sizes: default: the one that was trained.
        sequences: only the first so many.
        intervals: search the clipped interval of mask rates, too.
        progress: told after each batch how many sequences of how many are done on this rank.

    Raises:
        ValueError: a damaged checkpoint, data without a held-out split, another tokeniser, text shorter than a block,
            counts below 1, or a search with too little text or of a next-token model.
    """
    if draws < 1 or (sequences is not None and sequences < 1):
        raise ValueError(f"draws is {draws} and sequences {sequences}: give at least 1")
    if texts and data_path is not None:
        raise ValueError("texts are measured in place of held-out data: give one of --text and --data")
    with ExitStack() as stack:
        source = stack.enter_context(open_source(checkpoint))
        manifest = source.manifest
        sizes = _objectives(manifest, block_sizes, intervals=intervals)
        model, groups = stack.enter_context(source.load())
        if texts:
            asked = [size.block_size for size in sizes]
            measured = _prepared(manifest, source.tokenizer(), texts, asked, groups, stack)
        else:
            measured = _held_out(source, data_path)
        how: dict[str, Any] = {"sequences": sequences, "draws": draws, "intervals": intervals, "progress": progress}
        found = _evaluations(str(checkpoint), manifest.step, model, groups, measured, sizes, **how)
        if not is_alone(groups):
            dist.barrier()  # rank 0 removes the folder that all read
    return found


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
    """Return what `evaluate_checkpoint` finds of a file of these texts, with a model that is open and alone.

    name: for `Evaluation.checkpoint`.
    ValueError: text shorter than a block, or none, a block size that does not suit, or no draw.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: give at least 1")
    texts = [text for text in texts if text.strip()]  # as `DocumentReader` leaves them out
    if not texts:
        raise ValueError("there is no text to measure: give at least one that is not empty")
    (objective,) = _objectives(manifest, () if block_size is None else (block_size,))
    recipe, multiple = _text_recipe(manifest, [objective.block_size])
    samples, num_bytes = packed_texts(texts, tokenizer, seq_len=recipe.seq_len, document_multiple=multiple)
    read = partial(batches_in_order, samples, isolate_documents=recipe.isolate_documents)
    known = _trained_hashes(manifest)
    trained_on = None if known is None else count_known(known, hashes_of(texts))
    measured = _Measured("text", recipe, multiple, tokenizer, read, len(samples), num_bytes, trained_on=trained_on)
    counted = sum(int(batch.counted.sum()) for batch in measured.batches(len(samples)))
    if counted < objective.block_size:
        raise ValueError(
            f"the text has {counted} tokens, less than one block of {objective.block_size}: give more of it"
        )
    (found,) = _evaluations(name, manifest.step, model, lone_groups(), [measured], [objective], draws=draws)
    return found


def _text_recipe(manifest: CheckpointManifest, block_sizes: Sequence[int]) -> tuple[DataRecipe, int]:
    """How text of its own is cut into sequences for a model, and to whole blocks of what its documents are padded."""
    trained = manifest.trained_data()
    seq_len = manifest.max_position_embeddings
    seq_len = min(seq_len, LONGEST_CONTEXT) if manifest.trained_with is None else seq_len
    recipe = DataRecipe(path="", seq_len=seq_len, isolate_documents=trained is None or trained.isolate_documents)
    for block_size in block_sizes:
        check_block_size(block_size, recipe, block_size)
    multiple = math.lcm(*block_sizes) if recipe.isolate_documents else 1
    if seq_len % multiple:
        raise ValueError(
            f"no padding of documents suits blocks of {block_sizes} tokens at once: measure them one by one"
        )
    return recipe, multiple


def _objectives(
    manifest: CheckpointManifest, block_sizes: Sequence[int], *, intervals: bool = False
) -> list[Objective]:
    """Return what the model was trained for, at each block size."""
    trained = manifest.trained_objective()
    if not trained.fills_masks and (intervals or set(block_sizes) - {trained.block_size}):
        raise ValueError(
            "a model that masks nothing has neither blocks nor mask rates: leave --block-size and --intervals"
        )
    return [trained.at(size) for size in block_sizes or (trained.block_size,)]


def _evaluations(
    name: str,
    step: int,
    model: BlockDiffusionTransformer,
    groups: ProcessGroups,
    measured: Sequence[_Measured],
    sizes: Sequence[Objective],
    *,
    draws: int,
    sequences: int | None = None,
    intervals: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Evaluation]:
    """Of each text at each block size (collective)."""
    for objective in sizes:
        for text in measured:
            check_block_size(objective.block_size, text.recipe, text.document_multiple)
    counts = [min(sequences or text.sequences, text.sequences) for text in measured]
    if intervals and min(counts) < LEAST_SEQUENCES:
        raise ValueError(
            f"the interval search has {min(counts)} sequences and needs {LEAST_SEQUENCES}: take more held-out text"
        )
    whole, finished = sum(-(-count // groups.dp.size()) for count in counts) * len(sizes), 0

    def advance(count: int) -> None:
        nonlocal finished
        finished += count
        progress(finished, whole)

    found = []
    for text, count in zip(measured, counts, strict=True):
        tokens = (sizes[0].counting(batch) for batch in text.batches(count))
        unigram = unigram_perplexity(tokens, text.tokenizer.vocabulary.size)
        num_bytes = text.bytes(count, sizes[0])
        for objective in sizes:
            batches = text.batches(count, dp_rank=groups.dp.rank(), dp_size=groups.dp.size())
            how: dict[str, Any] = {"objective": objective, "draws": draws, "padded": True, "progress": advance}
            held_out = evaluate_nelbo([model], batches, groups, **how)
            result = _evaluation(name, step, text, objective, held_out, unigram, num_bytes)
            found.append(replace(result, intervals=held_out.intervals().found) if intervals else result)
    return found


def _evaluation(
    name: str,
    step: int,
    text: _Measured,
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


def _held_out(opened: Source, data_path: str | None) -> list[_Measured]:
    """Return the held-out splits of the data, one for each source that has one (collective)."""
    manifest = opened.manifest
    recipe, trained = data_recipe(manifest, data_path), manifest.trained_data()
    data = load_sources_of_node(recipe)
    tokenizer = load_tokenizer(opened.tokenizer_folder)
    check_tokenizer(data, tokenizer)
    paths = ", ".join(source.path for source in recipe.by_source.values())
    if data.vocabulary.bos_id != manifest.vocabulary.bos_id:
        raise ValueError(
            f"documents of {paths} begin with {data.vocabulary.bos_id}, those of the training with "
            f"{manifest.vocabulary.bos_id}: prepare them again with {bos_option(manifest.vocabulary)}"
        )
    if data.validation is None:
        raise ValueError(f"{paths} has no held-out split: prepare it with --holdout above 0")
    tokenizer = tokenizer.with_bos(manifest.vocabulary.bos_id)
    own_paths = [] if trained is None else [source.path for source in trained.by_source.values()]
    measured = []
    for name, source in recipe.by_source.items():
        if (part := data.part(name)).validation is None:
            continue
        own = source.path in own_paths
        found = None if own else read_hashes(Path(source.path), "validation")
        known = None if found is None else _trained_hashes(manifest)
        trained_on = None if known is None or found is None else count_known(known, found)
        told = {"own": own, "trained_on": trained_on}
        measured.append(_Measured.of_data(name or "held-out", source, part, tokenizer, **told))
    return measured


def _trained_hashes(manifest: CheckpointManifest) -> NDArray[np.uint64] | None:
    trained = manifest.trained_data()
    if trained is None:
        return None
    found = [read_hashes(Path(source.path), "train") for source in trained.by_source.values()]
    known = [hashes for hashes in found if hashes is not None]
    return np.concatenate(known) if len(known) == len(found) else None


def _prepared(
    manifest: CheckpointManifest,
    tokenizer: Tokenizer,
    texts: Sequence[NamedText],
    block_sizes: Sequence[int],
    groups: ProcessGroups,
    stack: ExitStack,
) -> list[_Measured]:
    """Return the texts in a temporary folder, made by rank 0."""
    alone = is_alone(groups)
    if not alone and os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):
        raise ValueError(
            "--text prepares its text on one machine: start all processes on one, or prepare it for --data"
        )
    recipe, multiple = _text_recipe(manifest, block_sizes)
    names = [text.name for text in texts]
    known = _trained_hashes(manifest)

    def prepare() -> dict[str, int | None]:
        folder = stack.enter_context(temporary_folder("texts"))
        found: dict[str, int | None] = {}
        for number, text in enumerate(texts):
            out = folder / str(number)
            data = text.prepare(out, tokenizer, seq_len=recipe.seq_len, document_multiple=multiple)
            text.check_length(data, max(block_sizes))
            documents = hashes_of(document.text for document in text.documents())
            found[str(out)] = None if known is None else count_known(known, documents)
        return found

    return [
        _Measured.of_data(
            text.name if names.count(text.name) == 1 else str(text.path),
            recipe.model_copy(update={"path": path}),
            load_manifest(path),
            tokenizer,
            trained_on=trained_on,
        )
        for text, (path, trained_on) in zip(texts, (prepare() if alone else on_rank_zero(prepare)).items(), strict=True)
    ]


def data_recipe(manifest: CheckpointManifest, data_path: str | None) -> DataRecipe:
    """Return what the run was trained on, or other prepared data. ValueError: there is neither."""
    trained_on = manifest.trained_data()
    if data_path is None:
        if trained_on is None and manifest.trained_with is None:
            raise ValueError("an imported model was trained on no data here: name some that are prepared, with --data")
        if trained_on is None:
            raise ValueError(
                f"this version cannot read which data the run was trained on, as {manifest.writer} recorded it: name "
                "data that are prepared, with --data"
            )
        return trained_on
    if trained_on is not None:
        return trained_on.first_source.model_copy(update={"path": data_path, "remote": None, "cache_limit": None})
    return DataRecipe(path=data_path, seq_len=load_manifest(data_path).seq_len)
