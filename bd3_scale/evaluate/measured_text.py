"""Prepare the texts that an evaluation measures: held-out splits of prepared data, or other text."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.data.batch import Batch
from bd3_scale.data.manifest import Manifest, bos_option, check_tokenizer, load_manifest
from bd3_scale.data.memory import packed_texts
from bd3_scale.data.node import load_sources_of_node
from bd3_scale.data.overlap import count_known, hashes_of, read_hashes
from bd3_scale.data.stream import batches_in_order, held_out_batches
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.evaluate.sets import NamedText
from bd3_scale.evaluate.text_statistics import counted_bytes
from bd3_scale.generate.source import Source
from bd3_scale.objective import Objective
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.parallel.groups import ProcessGroups, is_alone
from bd3_scale.recipe.checks import check_block_size
from bd3_scale.recipe.schema import DataRecipe
from bd3_scale.resilience.leftovers import temporary_folder

EVALUATION_BATCH = 16
# Most tokens of a sequence for an imported model, whose own limit may be a hundred thousand and more.
LONGEST_CONTEXT = 4096


@dataclass(frozen=True)
class MeasuredText:
    """Prepared text.

    read: `held_out_batches` of it, or a function that yields the same from samples in memory. sequences: their number.
    text_bytes: UTF-8 bytes of its whole text, None if not all of it counts. own, trained_on: see `Evaluation`.
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
        """Yield a data-parallel rank's batches of the first `sequences` sequences."""
        return self.read(batch_size=EVALUATION_BATCH, dp_rank=dp_rank, dp_size=dp_size, sequences=sequences)

    def bytes(self, sequences: int, objective: Objective) -> int:
        """Return the UTF-8 bytes of the text of the tokens that count for a model of `objective`."""
        if sequences == self.sequences and objective.predicts_first and self.text_bytes is not None:
            return self.text_bytes
        batches = self.batches(sequences)
        return counted_bytes(batches, self.tokenizer, lambda batch: objective.counting(batch).counted)


def _text_recipe(manifest: CheckpointManifest, block_sizes: Sequence[int]) -> tuple[DataRecipe, int]:
    """Return how text is cut into sequences for a model, and the multiple of tokens that documents are padded to."""
    trained = manifest.trained_data()
    seq_len = manifest.max_position_embeddings
    seq_len = min(seq_len, LONGEST_CONTEXT) if manifest.trained_with is None else seq_len
    recipe = DataRecipe(path="", seq_len=seq_len, isolate_documents=trained is None or trained.isolate_documents)
    for block_size in block_sizes:
        check_block_size(block_size, recipe, block_size)
    multiple = math.lcm(*block_sizes) if recipe.isolate_documents else 1
    if seq_len % multiple:
        raise ValueError(
            f"no padding of documents suits blocks of {block_sizes} tokens together: measure them one by one"
        )
    return recipe, multiple


def texts_in_memory(
    manifest: CheckpointManifest, tokenizer: Tokenizer, texts: Sequence[str], block_size: int
) -> MeasuredText:
    """Return the texts as one text to measure, packed in memory. ValueError: they have fewer tokens than a block."""
    recipe, multiple = _text_recipe(manifest, [block_size])
    samples, num_bytes = packed_texts(texts, tokenizer, seq_len=recipe.seq_len, document_multiple=multiple)
    read = partial(batches_in_order, samples, isolate_documents=recipe.isolate_documents)
    known = _training_hashes(manifest)
    trained_on = None if known is None else count_known(known, hashes_of(texts))
    text = MeasuredText("text", recipe, multiple, tokenizer, read, len(samples), num_bytes, trained_on=trained_on)
    counted = sum(int(batch.counted.sum()) for batch in text.batches(len(samples)))
    if counted < block_size:
        raise ValueError(f"the text has {counted} tokens, less than one block of {block_size}: give more of it")
    return text


def held_out_texts(opened: Source, data_path: str | None) -> list[MeasuredText]:
    """Return the held-out splits of prepared data, one for each source that has one (collective)."""
    manifest = opened.manifest
    recipe, trained = data_recipe(manifest, data_path), manifest.trained_data()
    data = load_sources_of_node(recipe)
    tokenizer = load_tokenizer(opened.tokenizer_folder)
    check_tokenizer(data, tokenizer)
    paths = ", ".join(source.path for source in recipe.by_source.values())
    if data.vocabulary.bos_id != manifest.vocabulary.bos_id:
        raise ValueError(
            f"documents of {paths} begin with id {data.vocabulary.bos_id}, those of the training with "
            f"{manifest.vocabulary.bos_id}: prepare the data again with {bos_option(manifest.vocabulary)}"
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
        hashes = None if own else read_hashes(Path(source.path), "validation")
        known = None if hashes is None else _training_hashes(manifest)
        trained_on = None if known is None or hashes is None else count_known(known, hashes)
        overlap = {"own": own, "trained_on": trained_on}
        measured.append(MeasuredText.of_data(name or "held-out", source, part, tokenizer, **overlap))
    return measured


def _training_hashes(manifest: CheckpointManifest) -> NDArray[np.uint64] | None:
    """Return the hashes of all training documents; None if those of any source are missing."""
    trained = manifest.trained_data()
    if trained is None:
        return None
    by_source = [read_hashes(Path(source.path), "train") for source in trained.by_source.values()]
    known = [hashes for hashes in by_source if hashes is not None]
    return np.concatenate(known) if len(known) == len(by_source) else None


def prepared_texts(
    manifest: CheckpointManifest,
    tokenizer: Tokenizer,
    texts: Sequence[NamedText],
    block_sizes: Sequence[int],
    groups: ProcessGroups,
    stack: ExitStack,
) -> list[MeasuredText]:
    """Prepare the texts in a temporary folder, on rank 0 (collective)."""
    alone = is_alone(groups)
    if not alone and os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):
        raise ValueError(
            "--text prepares its text on one machine: start all processes on one machine, or prepare the text for "
            "--data"
        )
    recipe, multiple = _text_recipe(manifest, block_sizes)
    names = [text.name for text in texts]
    known = _training_hashes(manifest)

    def prepare() -> dict[str, int | None]:
        folder = stack.enter_context(temporary_folder("texts"))
        known_documents: dict[str, int | None] = {}
        for number, text in enumerate(texts):
            out = folder / str(number)
            data = text.prepare(out, tokenizer, seq_len=recipe.seq_len, document_multiple=multiple)
            text.check_length(data, max(block_sizes))
            documents = hashes_of(document.text for document in text.documents())
            known_documents[str(out)] = None if known is None else count_known(known, documents)
        return known_documents

    return [
        MeasuredText.of_data(
            text.name if names.count(text.name) == 1 else str(text.path),
            recipe.model_copy(update={"path": path}),
            load_manifest(path),
            tokenizer,
            trained_on=trained_on,
        )
        for text, (path, trained_on) in zip(texts, (prepare() if alone else on_rank_zero(prepare)).items(), strict=True)
    ]


def data_recipe(manifest: CheckpointManifest, data_path: str | None) -> DataRecipe:
    """Return the data section of the training, or one for other prepared data. ValueError: there is neither."""
    trained_on = manifest.trained_data()
    if data_path is None:
        if trained_on is None and manifest.trained_with is None:
            raise ValueError("an imported model has no training data here: name prepared data with --data")
        if trained_on is None:
            raise ValueError(
                f"this version cannot read which data the run was trained on, recorded by {manifest.writer}: name "
                "prepared data with --data"
            )
        return trained_on
    if trained_on is not None:
        return trained_on.first_source.model_copy(update={"path": data_path, "remote": None, "cache_limit": None})
    return DataRecipe(path=data_path, seq_len=load_manifest(data_path).seq_len)
