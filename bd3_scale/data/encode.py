"""Encode documents as token ids, in worker processes: plain text, or conversations whose answers are trained on."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from bd3_scale.data.chat import ASSISTANT, ChatTemplate
from bd3_scale.data.manifest import SplitName
from bd3_scale.data.overlap import document_hash
from bd3_scale.data.packing import Span
from bd3_scale.data.sources import DocumentReader
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.recipe.vocabulary import Vocabulary

CHUNK_CHARACTERS = 1 << 20


def token_dtype(vocabulary: Vocabulary) -> type[np.unsignedinteger]:
    """Return the dtype of stored tokens: uint16 if all ids fit."""
    return np.uint16 if vocabulary.size <= 1 << 16 else np.uint32


@dataclass(frozen=True)
class EncodedDocument:
    """A document's tokens without EOS; `shown`: runs of tokens that are not trained on."""

    ids: NDArray[np.unsignedinteger]
    num_bytes: int
    split: SplitName
    hash: int
    shown: tuple[Span, ...]
    trains_end: bool


@dataclass(frozen=True)
class Encoder:
    """Encodes texts as token ids and assigns them to splits: everything that runs in the worker processes.

    With `chat`, a text is a JSON list: where the conversation stands in its file, and its messages.
    """

    tokenizer: Tokenizer
    seed: int
    holdout: float = 0.0
    parse_special: bool = False
    chat: ChatTemplate | None = None

    def __call__(self, texts: list[str]) -> list[EncodedDocument]:
        """Return the encoded documents of some texts."""
        if self.chat is not None:
            return [self._conversation(text) for text in texts]
        encoded = self.tokenizer.encode_batch(texts, self.parse_special)
        return [self.document(*pair) for pair in zip(texts, encoded, strict=True)]

    def key_of(self, text: str) -> str:
        """Return the key by which documents are equal: the text, or the conversation without its place in the file."""
        return text if self.chat is None else json.dumps(json.loads(text)[1])

    def split_of(self, text: str) -> SplitName:
        """Return a document's split, from a hash of text and seed, so that equal documents go to the same split."""
        if self.holdout in (0, 1):
            return "validation" if self.holdout else "train"
        key, data = self.seed.to_bytes(8, "big"), self.key_of(text).encode("utf-8")
        draw = int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "big")
        return "validation" if draw < self.holdout * 2**64 else "train"

    def document(self, text: str, ids: list[int]) -> EncodedDocument:
        """Return a document of a text and its ids; BOS is added if the tokeniser has one."""
        bos_id = self.tokenizer.vocabulary.bos_id
        shown: tuple[Span, ...] = ()
        if bos_id is not None:
            ids, shown = [bos_id, *ids], ((0, 1),)
        return self._encoded(text, ids, len(text.encode("utf-8")), self.split_of(text), shown, True)

    def _conversation(self, source: str) -> EncodedDocument:
        assert self.chat is not None
        where, messages = json.loads(source)
        try:
            text, spans = self.chat.spans(messages)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        ids, places = self.tokenizer.encode_spans(text)
        shown = [not any(start < last and end > first for first, last in spans) for start, end in places]
        num_bytes = sum(len(text[first:last].encode("utf-8")) for first, last in spans)
        # After a user's message no answer follows; training on EOS there would teach that there is none.
        trains_end = messages[-1]["role"] == ASSISTANT
        return self._encoded(text, ids, num_bytes, self.split_of(source), tuple(_runs(shown)), trains_end)

    def _encoded(
        self, text: str, ids: list[int], num_bytes: int, split: SplitName, shown: tuple[Span, ...], trains_end: bool
    ) -> EncodedDocument:
        # Through `array`, which converts a list of ints in half the time of numpy.
        tokens = np.asarray(array(np.dtype(token_dtype(self.tokenizer.vocabulary)).char, ids))
        return EncodedDocument(tokens, num_bytes, split, document_hash(text), shown, trains_end)


def _runs(flags: Sequence[bool]) -> Iterator[Span]:
    """Yield start and end of each run of true values."""
    place = 0
    for flag, run in groupby(flags):
        length = len(list(run))
        if flag:
            yield place, place + length
        place += length


def chunks(reader: DocumentReader) -> Iterator[tuple[list[str], int]]:
    """Yield the documents in order, about a megabyte at a time, with the bytes of the source files read so far."""
    texts: list[str] = []
    size = position = 0
    for document in reader:
        texts.append(document.text)
        size, position = size + len(document.text), document.position
        if size >= CHUNK_CHARACTERS:
            yield texts, position
            texts, size = [], 0
    if texts:
        yield texts, position
