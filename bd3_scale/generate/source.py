"""Describe a model to generate with or to measure, before it is loaded: a checkpoint, or a GGUF file for llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import torch

from bd3_scale.checkpoint.folder import GGUF_ENDING, resolve_checkpoint
from bd3_scale.checkpoint.manifest import TOKENIZER, CheckpointManifest, read_manifest
from bd3_scale.checkpoint.model import open_model
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.generate.llama_file import LlamaFile, open_llama_file
from bd3_scale.generate.text import check_fills_masks, default_min_entropy, stop_ids
from bd3_scale.generate.writer import Writer
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.observe.environment import has_fast_bf16
from bd3_scale.parallel.groups import ProcessGroups, lone_groups
from bd3_scale.resilience.terminal import tell

Opened = tuple[BlockDiffusionTransformer, ProcessGroups]


@dataclass(frozen=True)
class Source:
    """A trained model that is not loaded yet.

    tokenizer_folder: holds its tokeniser, and perhaps a chat template; load: returns a context manager that loads it.
    """

    path: Path
    manifest: CheckpointManifest
    tokenizer_folder: Path
    stop_ids: tuple[int, ...]
    least_entropy: Callable[[], float]
    load: Callable[[], AbstractContextManager[Opened]]

    def tokenizer(self) -> Tokenizer:
        """Return the tokeniser, with BOS if documents of the training began with it. ValueError: there is none."""
        if not self.tokenizer_folder.is_dir():
            raise ValueError(f"{self.path} has no folder {TOKENIZER}: text cannot be read or written with it")
        return load_tokenizer(self.tokenizer_folder).with_bos(self.manifest.vocabulary.bos_id)

    def writer(self, model: BlockDiffusionTransformer, tokenizer: Tokenizer) -> Writer:
        """Return a writer for the loaded model. ValueError: the model fills no masks."""
        check_fills_masks(self.path, self.manifest)
        return Writer(
            model,
            tokenizer,
            block_size=self.manifest.block_size,
            context=self.manifest.max_position_embeddings,
            eos_ids=self.stop_ids,
            least_entropy=self.least_entropy,
            chat_template=self.tokenizer_folder,
        )


def resolve_source(path: Path) -> Path:
    """Return the path of a GGUF file unchanged, and for any other path the checkpoint. ValueError: there is none."""
    return path if path.suffix == GGUF_ENDING else resolve_checkpoint(path)


@contextmanager
def open_source(path: Path, dtype: torch.dtype | None = None, tensor: int | None = None) -> Iterator[Source]:
    """Read the description of a checkpoint, or of a file whose name ends in `.gguf`.

    dtype: of a checkpoint's weights in memory; default: that of the training's forward. tensor: see `open_model`.
    ValueError: it is damaged, or neither of both; or `dtype` is given for a GGUF file, whose weights have fixed types.
    """
    if path.suffix != GGUF_ENDING:
        if dtype == torch.bfloat16 and not has_fast_bf16():
            tell("warning: this CPU does not multiply bfloat16 natively: float32 is several times as fast")
        yield checkpoint_source(path, read_manifest(path), dtype, tensor)
        return
    if dtype is not None:
        raise ValueError(
            f"the weights in {path} have fixed types: leave out --dtype, or export the file with another type"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"llama.cpp runs {path} in one process: start it without torchrun or srun")
    with open_llama_file(path) as file:
        yield Source(
            path, file.manifest, file.tokenizer, file.stop_ids, lambda: file.min_entropy, lambda: _loaded(file)
        )


def checkpoint_source(
    checkpoint: Path, manifest: CheckpointManifest, dtype: torch.dtype | None = None, tensor: int | None = None
) -> Source:
    """Return the source of a checkpoint; see `open_source`."""

    @contextmanager
    def loaded() -> Iterator[Opened]:
        with open_model(checkpoint, dtype, tensor) as (model, _, groups):
            yield model, groups

    ids = stop_ids(checkpoint, manifest)
    return Source(
        checkpoint, manifest, checkpoint / TOKENIZER, ids, cache(lambda: default_min_entropy(manifest)), loaded
    )


@contextmanager
def _loaded(file: LlamaFile) -> Iterator[Opened]:
    with closing(file.load()) as model:
        # `LlamaModel` has the methods of the PyTorch model that sampling and evaluation call.
        yield cast(BlockDiffusionTransformer, model), lone_groups()


@contextmanager
def open_writer(path: Path, dtype: torch.dtype | None = None, tensor: int | None = None) -> Iterator[Writer]:
    """Load a checkpoint or GGUF file for generation; dtype, tensor: see `open_source`.

    Raises:
        ValueError: it has no tokeniser, is damaged, or its model fills no masks.
    """
    with open_source(path, dtype, tensor) as source:
        tokenizer = source.tokenizer()
        check_fills_masks(path, source.manifest)
        with source.load() as (model, _):
            yield source.writer(model, tokenizer)
