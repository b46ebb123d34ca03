"""A GGUF file of ours, opened: the model in llama.cpp's hands, and what its checkpoint said of it.

Beside the keys that llama.cpp reads, a file holds the checkpoint's manifest, the tokeniser's files, the ids that end a
text and the entropy below which one is taken for stuck, so that it is decoded as the checkpoint is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bd3_scale.checkpoint.formats import up_to_date
from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.data.chat import CHAT_TEMPLATE
from bd3_scale.data.tokenizer import TOKENIZER_FILES
from bd3_scale.generate import llama_cpp
from bd3_scale.generate.llama_model import LlamaModel
from bd3_scale.resilience.leftovers import temporary_folder
from bd3_scale.resilience.readers import open_regular, reader

SUFFIX = ".bd3.gguf"
ENDING = ".gguf"
BLOCK_LENGTH = "diffusion.block_length"
SHIFT_LOGITS = "diffusion.shift_logits"
MANIFEST = "bd3_scale.manifest"
STOP_IDS = "bd3_scale.stop_ids"
MIN_ENTROPY = "bd3_scale.min_entropy"
TOKENIZER_JSON = "tokenizer.huggingface.json"
TOKENIZER_CONFIG = "bd3_scale.tokenizer_config"
TEMPLATE = "tokenizer.chat_template"
FILE_TYPE = "general.file_type"
_EXACT = "0"  # float32, whose cache is in float32, too


@dataclass(frozen=True)
class LlamaFile:
    """What a file says of its model. tokenizer: the folder of its tokeniser, as long as the file is open."""

    manifest: CheckpointManifest
    tokenizer: Path
    stop_ids: tuple[int, ...]
    min_entropy: float
    opened: llama_cpp.Model
    exact: bool

    def load(self) -> LlamaModel:
        """Return the model. ValueError: this build of llama.cpp computes it in a way that is not known."""
        return LlamaModel(
            self.opened,
            self.manifest.vocabulary,
            block_size=self.manifest.block_size,
            threads=torch.get_num_threads(),
            exact=self.exact,
        )


@contextmanager
def open_llama_file(path: Path) -> Iterator[LlamaFile]:
    """Open a file that `convert export --format gguf` wrote.

    ValueError: it is another one, or llama.cpp cannot open it.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder("gguf"))
        opened = stack.enter_context(closing(_open(path)))
        yield _described(path, opened, folder / "tokenizer")


def _open(path: Path) -> llama_cpp.Model:
    with open_regular(path) as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: give one that `convert export --format gguf` wrote")
    return llama_cpp.Model(path)


@reader("a GGUF file of bd3_scale", path="path")
def _described(path: Path, opened: llama_cpp.Model, tokenizer: Path) -> LlamaFile:
    tokenizer.mkdir()
    for name, key in zip(TOKENIZER_FILES, (TOKENIZER_JSON, TOKENIZER_CONFIG), strict=True):
        (tokenizer / name).write_text(_value(path, opened, key), encoding="utf-8")
    if (template := opened.metadata(TEMPLATE)) is not None:
        (tokenizer / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    manifest = CheckpointManifest.model_validate(up_to_date(json.loads(_value(path, opened, MANIFEST))))
    for key, expected in ((BLOCK_LENGTH, str(manifest.block_size)), (SHIFT_LOGITS, "false")):
        if (found := _value(path, opened, key)) != expected:
            raise ValueError(f"{path} says {key}={found}, and its manifest {expected}: export the model again")
    return LlamaFile(
        manifest,
        tokenizer,
        tuple(int(number) for number in json.loads(_value(path, opened, STOP_IDS))),
        float(_value(path, opened, MIN_ENTROPY)),
        opened,
        exact=opened.metadata(FILE_TYPE) == _EXACT,
    )


def _value(path: Path, opened: llama_cpp.Model, key: str) -> str:
    found = opened.metadata(key)
    if found is None:
        raise ValueError(
            f"{path} has no key {key}: it is a GGUF file of other software; give one that "
            "`bd3-scale convert export --format gguf` wrote"
        )
    return found
