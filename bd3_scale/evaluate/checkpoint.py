"""A checkpoint measured on the held-out split of its data, or on other text."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from bd3_scale.checkpoint.manifest import TOKENIZER, CheckpointManifest
from bd3_scale.checkpoint.model import open_model
from bd3_scale.data.batch import Batch
from bd3_scale.data.manifest import Manifest, Split, bos_option, check_tokenizer, load_manifest
from bd3_scale.data.overlap import count_known, hashes_of, read_hashes
from bd3_scale.data.stream import held_out_batches
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.diffusion.interval import LEAST_SEQUENCES, IntervalVariance
from bd3_scale.evaluate.nelbo import HeldOut, evaluate_nelbo
from bd3_scale.evaluate.sets import NamedText
from bd3_scale.evaluate.yardsticks import counted_bytes, unigram_perplexity
from bd3_scale.generate.text import checkpoint_tokenizer
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.objective import Objective
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.parallel.groups import ProcessGroups, is_alone
from bd3_scale.recipe.checks import check_block_size
from bd3_scale.recipe.schema import DataRecipe
from bd3_scale.resilience.leftovers import temporary_folder

EVALUATION_BATCH = 16
# Of an imported model, where text is measured: what it may take can be far more than anybody measures with.
LONGEST_CONTEXT = 4096


@dataclass(frozen=True)
class Evaluation:
    """`nelbo` and its standard errors in nats a token; `exact`: it is the likelihood and no bound.

    text: `held-out`, or the name of another text. context: tokens of a sequence, which begins without any before it.
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
    """Text that is prepared."""

    name: str
    recipe: DataRecipe
    data: Manifest
    tokenizer: Tokenizer
    own: bool = False
    trained_on: int | None = None

    @property
    def split(self) -> Split:
        assert self.data.validation is not None
        return self.data.validation

    def batches(self, sequences: int, *, dp_rank: int = 0, dp_size: int = 1) -> Iterator[Batch]:
        share = {"dp_rank": dp_rank, "dp_size": dp_size, "sequences": sequences}
        return held_out_batches(self.recipe, self.data, batch_size=EVALUATION_BATCH, **share)

    def bytes(self, sequences: int, objective: Objective) -> int:
        """Return the UTF-8 bytes of the text of the tokens that count for a model of `objective`."""
        if sequences == self.split.sequences and objective.predicts_first and not self.data.messages:
            return self.split.text_bytes
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
        model, manifest, groups = stack.enter_context(open_model(checkpoint))
        sizes = _objectives(manifest, block_sizes, intervals=intervals)
        if texts:
            tokenizer = checkpoint_tokenizer(checkpoint, manifest)
            measured = _prepared(manifest, tokenizer, texts, [size.block_size for size in sizes], groups, stack)
        else:
            measured = [_held_out(checkpoint, manifest, data_path)]
        how: dict[str, Any] = {"sequences": sequences, "draws": draws, "intervals": intervals, "progress": progress}
        found = _evaluations(str(checkpoint), manifest.step, model, groups, measured, sizes, **how)
        if not is_alone(groups):
            dist.barrier()  # rank 0 removes the folder that all read
    return found


def evaluate_texts(
    name: str,
    model: BlockDiffusionTransformer,
    manifest: CheckpointManifest,
    groups: ProcessGroups,
    tokenizer: Tokenizer,
    texts: Sequence[NamedText],
    *,
    block_sizes: Sequence[int] = (),
    draws: int = 4,
) -> list[Evaluation]:
    """Return what `evaluate_checkpoint` finds of texts, with a model that is open; name: for `Evaluation.checkpoint`.

    ValueError: text shorter than a block, a block size that does not suit, or no draw.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: give at least 1")
    sizes = _objectives(manifest, block_sizes)
    with ExitStack() as stack:
        measured = _prepared(manifest, tokenizer, texts, [size.block_size for size in sizes], groups, stack)
        return _evaluations(name, manifest.step, model, groups, measured, sizes, draws=draws)


def _objectives(
    manifest: CheckpointManifest, block_sizes: Sequence[int], *, intervals: bool = False
) -> list[Objective]:
    """What the model was trained for, at each block size."""
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
            check_block_size(objective.block_size, text.recipe, text.data.document_multiple)
    counts = [min(sequences or text.split.sequences, text.split.sequences) for text in measured]
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
        unigram = unigram_perplexity(tokens, text.data.vocabulary.size)
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


def _held_out(checkpoint: Path, manifest: CheckpointManifest, data_path: str | None) -> _Measured:
    recipe = data_recipe(manifest, data_path)
    data = load_manifest(recipe.path, recipe.remote)
    tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    check_tokenizer(data, tokenizer)
    if data.vocabulary.bos_id != manifest.vocabulary.bos_id:
        raise ValueError(
            f"documents of {recipe.path} begin with {data.vocabulary.bos_id}, those of the training with "
            f"{manifest.vocabulary.bos_id}: prepare them again with {bos_option(manifest.vocabulary)}"
        )
    if data.validation is None:
        raise ValueError(f"{recipe.path} has no held-out split: prepare it with --holdout above 0")
    trained = manifest.trained_data()
    own = trained is not None and recipe.path == trained.path
    found = None if own else read_hashes(Path(recipe.path), "validation")
    known = _trained_hashes(manifest)
    trained_on = None if known is None or found is None else count_known(known, found)
    return _Measured("held-out", recipe, data, tokenizer.with_bos(manifest.vocabulary.bos_id), own, trained_on)


def _trained_hashes(manifest: CheckpointManifest) -> NDArray[np.uint64] | None:
    trained = manifest.trained_data()
    return None if trained is None else read_hashes(Path(trained.path), "train")


def _prepared(
    manifest: CheckpointManifest,
    tokenizer: Tokenizer,
    texts: Sequence[NamedText],
    block_sizes: Sequence[int],
    groups: ProcessGroups,
    stack: ExitStack,
) -> list[_Measured]:
    """The texts in a temporary folder, made by rank 0."""
    alone = is_alone(groups)
    if not alone and os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):
        raise ValueError(
            "--text prepares its text on one machine: start all processes on one, or prepare it for --data"
        )
    trained = manifest.trained_data()
    seq_len = manifest.max_position_embeddings
    seq_len = min(seq_len, LONGEST_CONTEXT) if manifest.trained_with is None else seq_len
    isolate = trained is None or trained.isolate_documents
    multiple = math.lcm(*block_sizes) if isolate else 1
    for block_size in block_sizes:
        check_block_size(block_size, DataRecipe(path="", seq_len=seq_len), block_size)
    if seq_len % multiple:
        raise ValueError(
            f"no padding of documents suits blocks of {block_sizes} tokens at once: measure them one by one"
        )
    names = [text.name for text in texts]
    known = _trained_hashes(manifest)

    def prepare() -> dict[str, int | None]:
        folder = stack.enter_context(temporary_folder("texts"))
        found: dict[str, int | None] = {}
        for number, text in enumerate(texts):
            out = folder / str(number)
            data = text.prepare(out, tokenizer, seq_len=seq_len, document_multiple=multiple)
            text.check_length(data, max(block_sizes))
            documents = hashes_of(document.text for document in text.documents())
            found[str(out)] = None if known is None else count_known(known, documents)
        return found

    found = prepare() if alone else on_rank_zero(prepare)
    return [
        _Measured(
            text.name if names.count(text.name) == 1 else str(text.path),
            DataRecipe(path=path, seq_len=seq_len, isolate_documents=isolate),
            load_manifest(path),
            tokenizer,
            trained_on=trained_on,
        )
        for text, (path, trained_on) in zip(texts, found.items(), strict=True)
    ]


def data_recipe(manifest: CheckpointManifest, data_path: str | None) -> DataRecipe:
    """What the run was trained on, or other prepared data. ValueError: there is neither."""
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
        return trained_on.model_copy(update={"path": data_path, "remote": None, "cache_limit": None})
    return DataRecipe(path=data_path, seq_len=load_manifest(data_path).seq_len)
