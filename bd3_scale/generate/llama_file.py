"""Open a GGUF file that this package exported: the model in llama.cpp, and what its checkpoint said of it.

Besides the keys that llama.cpp reads, a file holds the checkpoint's manifest, the tokeniser's files, the ids that end a
text and the entropy below which a text has degenerated, so that text is generated as from the checkpoint.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from bd3_scale.checkpoint.formats import up_to_date
from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.data.chat import CHAT_TEMPLATE
from bd3_scale.data.tokenizer import TOKENIZER_FILES
from bd3_scale.generate import llama_cpp
from bd3_scale.generate.llama_model import LlamaModel
from bd3_scale.resilience.leftovers import temporary_folder
from bd3_scale.resilience.readers import LIMIT_BYTES, open_regular, reader

SUFFIX = ".bd3.gguf"
BLOCK_LENGTH = "diffusion.block_length"
SHIFT_LOGITS = "diffusion.shift_logits"
MANIFEST = "bd3_scale.manifest"
STOP_IDS = "bd3_scale.stop_ids"
MIN_ENTROPY = "bd3_scale.min_entropy"
TOKENIZER_JSON = "tokenizer.huggingface.json"
TOKENIZER_CONFIG = "bd3_scale.tokenizer_config"
TEMPLATE = "tokenizer.chat_template"
FILE_TYPE = "general.file_type"
# Behind the last tensor: a magic number, the bytes before the first tensor, and their XXH3-128.
_SEAL, _SEAL_MAGIC = struct.Struct("<8sQ16s"), b"bd3gguf1"
_EXACT = "0"  # the file type of float32 weights (LLAMA_FTYPE_ALL_F32); their cache is float32, too


@dataclass(frozen=True)
class LlamaFile:
    """An open file and its description. tokenizer: folder of its tokeniser, which exists while the file is open."""

    manifest: CheckpointManifest
    tokenizer: Path
    stop_ids: tuple[int, ...]
    min_entropy: float
    opened: llama_cpp.Model
    exact: bool

    def load(self) -> LlamaModel:
        """Return the model. ValueError: this build of llama.cpp handles sequences in an unknown way."""
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

    ValueError: it is another kind of file, damaged, or llama.cpp cannot open it.
    """
    with temporary_folder("gguf") as folder:
        opened = _open(path)
        with closing(opened):
            yield _described(path, opened, folder / "tokenizer")


@reader("a GGUF file")
def _open(path: Path) -> llama_cpp.Model:
    """Let llama.cpp open a file after its header is checked: on a damaged one it may abort the process."""
    check_seal(path)
    return llama_cpp.Model(path)


def check_seal(path: Path) -> None:
    """Raise ValueError if a file was not exported here, or the bytes before its first tensor have changed."""
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _SEAL.size))
        end = file.read()
        magic, length, digest = _SEAL.unpack(end) if len(end) == _SEAL.size else (b"", 0, b"")
        if magic != _SEAL_MAGIC:
            raise ValueError(
                f"{path} was not written by `bd3-scale convert export --format gguf`, or is incomplete: export the "
                "model again"
            )
        file.seek(0)
        if length > LIMIT_BYTES or xxhash.xxh3_128_digest(file.read(length)) != digest:
            raise ValueError(f"{path} is damaged: its header has changed since it was written; export the model again")


def seal(path: Path, header_bytes: int) -> None:
    """Append the hash of a file's header behind its last tensor, where llama.cpp does not read."""
    with path.open("rb+") as file:
        digest = xxhash.xxh3_128_digest(file.read(header_bytes))
        file.seek(0, os.SEEK_END)
        file.write(_SEAL.pack(_SEAL_MAGIC, header_bytes, digest))


def _described(path: Path, opened: llama_cpp.Model, tokenizer: Path) -> LlamaFile:
    tokenizer.mkdir()
    for name, key in zip(TOKENIZER_FILES, (TOKENIZER_JSON, TOKENIZER_CONFIG), strict=True):
        (tokenizer / name).write_text(_value(path, opened, key), encoding="utf-8")
    if (template := opened.metadata(TEMPLATE)) is not None:
        (tokenizer / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    manifest = CheckpointManifest.model_validate(up_to_date(json.loads(_value(path, opened, MANIFEST))))
    for key, expected in ((BLOCK_LENGTH, str(manifest.block_size)), (SHIFT_LOGITS, "false")):
        if (value := _value(path, opened, key)) != expected:
            raise ValueError(f"{path} has {key}={value}, and its manifest {expected}: export the model again")
    return LlamaFile(
        manifest,
        tokenizer,
        tuple(int(number) for number in json.loads(_value(path, opened, STOP_IDS))),
        float(_value(path, opened, MIN_ENTROPY)),
        opened,
        exact=opened.metadata(FILE_TYPE) == _EXACT,
    )


def _value(path: Path, opened: llama_cpp.Model, key: str) -> str:
    value = opened.metadata(key)
    if value is None:
        raise ValueError(f"{path} has no key {key}, which this version needs: export the model again")
    return value
