"""Import corpora that other programs tokenised: MosaicML Foundry's MDS, and Megatron's `.bin` with its `.idx`.

Documents are separated by EOS and BOS among the ids, and by Megatron's index; then they are packed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from bd3_scale.data import mds, megatron
from bd3_scale.data.encode import EncodedDocument, Encoder
from bd3_scale.data.remote_files import SourceFile, is_remote
from bd3_scale.data.sources import DocumentReader, FilePart, Part
from bd3_scale.data.tokenizer import Tokenizer

Kind = Literal["mds", "mds-documents", "megatron"]
Ids = NDArray[np.integer]

# Limit of a document.
MAX_TOKENS = 1 << 25
_STORED = np.dtype("<u4")


class TokenReader(DocumentReader):
    """The documents of tokenised `sources`, without BOS and EOS; the text of a document is a code for its ids.

    Args:
        sources: folders of MDS with an index, or Megatron's files, with or without suffix.
        kind: in `mds` a document may span samples of a shard; in `mds-documents` each sample is a document. In all
            kinds, EOS ends a document and BOS begins one.
        tokenizer: the tokeniser of the ids.

    Raises FileNotFoundError and ValueError: `sources` are not of that kind; while iterating, ValueError for a damaged
    file, for the mask's id, for an id without a token, and for samples without any end of a document.
    """

    def __init__(self, sources: Sequence[str | Path], kind: Kind, tokenizer: Tokenizer) -> None:
        if remote := next(filter(is_remote, sources), None):
            raise ValueError(f"{remote} is remote, and tokens are read from a disk: copy them to one first")
        paths = [Path(source) for source in sources]
        self._kind, self._shards = kind, {} if kind == "megatron" else mds.shards(paths)
        self.files = list(megatron.files(paths) if kind == "megatron" else self._shards)
        vocabulary = tokenizer.vocabulary
        begins = [] if tokenizer.declared_bos_id is None else [tokenizer.declared_bos_id]
        self._ends, self._mask_id = [vocabulary.eos_id, *begins], vocabulary.mask_id
        self._is_token = np.array([tokenizer.name_of(token) is not None for token in range(vocabulary.size)])
        self._on_error = "stop"
        self._parts: Sequence[FilePart] | None = None
        self._reset()

    @property
    def modules(self) -> set[str]:
        return set()

    def cut(self, num_bytes: int) -> Iterator[FilePart]:
        """Yield the parts: shards of MDS, or byte ranges of Megatron's files with the documents that begin there."""
        for whole in self.parts:
            if self._kind != "megatron" or whole.num_bytes <= num_bytes:
                yield whole
                continue
            for start in range(0, whole.num_bytes, num_bytes):
                end = min(start + num_bytes, whole.num_bytes)
                yield FilePart(whole.file, end - start, (start, end))

    def _texts(self, file: SourceFile, raw: BinaryIO, part: Part | None) -> Iterator[str]:
        assert isinstance(file, Path)
        pieces: Iterable[tuple[str, Ids]]
        if self._kind == "megatron":
            pieces = megatron.documents(file, raw, part, MAX_TOKENS)
        else:
            pieces = mds.samples(file, raw, self._shards[file], self._is_token)
        checked = (self._checked(where, ids) for where, ids in pieces)
        for document in self._joined(file, checked) if self._kind == "mds" else checked:
            yield from (_as_text(ids) for ids in self._divided(document) if ids.size)

    def _checked(self, where: str, ids: Ids) -> Ids:
        is_inside = (ids >= 0) & (ids < len(self._is_token))
        is_wrong = ~is_inside | ~self._is_token[np.where(is_inside, ids, 0)] | (ids == self._mask_id)
        if not is_wrong.any():
            return ids
        wrong = int(ids[is_wrong.argmax()])
        if wrong == self._mask_id:
            raise ValueError(
                f"{where} has the id {wrong}, which is the mask's: no text has it; name another as the mask"
            )
        raise ValueError(
            f"{where} has the id {wrong}, which no token of the tokeniser's {len(self._is_token)} ids has: give the "
            "tokeniser that it was made with as --tokenizer"
        )

    def _joined(self, file: Path, samples: Iterator[Ids]) -> Iterator[Ids]:
        """Yield the ids up to the last document end of each sample, and at the end the rest."""
        waiting: list[Ids] = []
        num_waiting = 0
        has_end = False
        for ids in samples:
            ends = np.flatnonzero(np.isin(ids, self._ends))
            if ends.size:
                has_end = True
                yield np.concatenate([*waiting, ids[: ends[-1]]])
                waiting, num_waiting = [], 0
            waiting.append(ids[ends[-1] :] if ends.size else ids)
            num_waiting += len(waiting[-1])
            if num_waiting > MAX_TOKENS:
                break
        if num_waiting > MAX_TOKENS or (waiting and not has_end):
            raise ValueError(
                f"{file} has no end of document (the id {self._ends[0]}) in {num_waiting:,} tokens: give the tokeniser "
                "that it was made with, or --format mds-documents where each sample is a document"
            )
        yield from [np.concatenate(waiting)] if waiting else []

    def _divided(self, ids: Ids) -> Iterator[Ids]:
        """Yield the documents between BOS and EOS tokens."""
        begin = 0
        for end in [*np.flatnonzero(np.isin(ids, self._ends)).tolist(), len(ids)]:
            yield ids[begin:end]
            begin = end + 1


@dataclass(frozen=True)
class TokenEncoder(Encoder):
    """Encodes documents of a `TokenReader`: ids stay, and their decoded text decides splits and hashes."""

    def __call__(self, texts: list[str]) -> list[EncodedDocument]:
        """Return the encoded documents of some coded ids."""
        of_text = Encoder(self.tokenizer, self.seed, self.holdout)
        return [of_text.document(self.key_of(text), _ids_of(text).tolist()) for text in texts]

    def key_of(self, text: str) -> str:
        return self.tokenizer.decode(_ids_of(text).tolist())


def _as_text(ids: Ids) -> str:
    """Return ids coded as a string, one character a byte: a DocumentReader yields strings."""
    return ids.astype(_STORED).tobytes().decode("latin-1")


def _ids_of(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("latin-1"), _STORED)
