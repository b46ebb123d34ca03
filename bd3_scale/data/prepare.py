"""From documents to sharded token sequences: read, tokenise in parallel, split by document, pack, write MDS shards."""

from __future__ import annotations

import json
import os
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from bd3_scale.data.chat import ASSISTANT, CHAT_TEMPLATE, ChatTemplate
from bd3_scale.data.encode import EncodedDocument, Encoder, encoded_chunks, token_dtype
from bd3_scale.data.manifest import (
    MANIFEST_FILE,
    Manifest,
    Source,
    Split,
    SplitName,
    differing,
    load_manifest,
    parse_manifest,
)
from bd3_scale.data.overlap import write_hashes
from bd3_scale.data.packing import PackedSequence, Packer
from bd3_scale.data.prompts import check_messages
from bd3_scale.data.sources import DOCUMENT_BYTES, DocumentReader, field_value
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.observe.console import Console, label
from bd3_scale.resilience.files import new_folder
from bd3_scale.resilience.readers import read_regular

SHARD_BYTES = 1 << 26
OnError = Literal["stop", "skip"]


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    document_multiple: int = 32,
    holdout: float = 0.05,
    validation: Sequence[str | Path] = (),
    seed: int = 1,
    workers: int | None = None,
    progress: bool = True,
    field: str | None = None,
    on_error: OnError = "stop",
    parse_special: bool = False,
    chat: ChatTemplate | None = None,
    max_document_bytes: int = DOCUMENT_BYTES,
) -> Manifest:
    """Tokenise the documents of `sources` into the new folder `out`: the MDS shards of `train/` and `validation/`, the
    tokeniser, the hashes of documents and the manifest.

    A sample holds `tokens` [seq_len] (uint16; uint32 for a vocabulary above 65,536), `document_lengths` and
    `counted_lengths` (int32), and where any token is shown `shown` (int32), see `PackedSequence`. Documents begin with
    `tokenizer.vocabulary.bos_id`, which is shown; `parse_special`: special tokens but the mask that a document spells
    are these tokens. With `chat`, lines hold conversations, of which all but the assistant's part is shown. `field`
    (default `text`, of conversations `messages`), `on_error` and `max_document_bytes`: see `DocumentReader`. Documents
    keep their order: training shuffles the sequences. The share `holdout` of the documents goes to `validation`, by a
    hash of text and `seed`, so that equal documents go to one side; 0 holds out none, 1 all. Where the sources
    `validation` are given, they are held out in place of a share. The last, incomplete sequence is dropped from
    `train`, and filled in `validation` with tokens that do not count. The result does not depend on `workers`
    (processes; default: the usable CPUs).

    Raises FileExistsError if `out` exists, and says what differs there; ValueError for arguments out of range, sources
    that cannot be read (see `DocumentReader`) and a split that would be empty, before tokenising where that can be
    known. `out` exists afterwards only if all went well.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    _check_arguments(seq_len, document_multiple, holdout, seed, workers)
    encoder = Encoder(tokenizer.checked_template(), seed, parse_special=parse_special, chat=chat)
    shares = {_reader(sources, field, on_error, chat, max_document_bytes): 0.0 if validation else holdout}
    if validation:
        shares[_reader(validation, field, on_error, chat, max_document_bytes)] = 1.0
    asked = Manifest(
        vocabulary=encoder.tokenizer.vocabulary,
        tokenizer_hash=encoder.tokenizer.hash,
        seq_len=seq_len,
        document_multiple=document_multiple,
        holdout=0.0 if validation else holdout,
        seed=seed,
        empty_documents=0,
        field=field or "",
        parse_special=parse_special,
        messages=chat is not None,
        sources=tuple(Source(path=str(file), bytes=file.stat().st_size) for reader in shares for file in reader.files),
        train=None,
        validation=None,
    )
    _check_new(Path(out), asked)
    _check_splits(shares, encoder)
    with new_folder(Path(out)) as folder:
        splits = _write_splits(folder, shares, encoder, asked, workers, progress)
        encoder.tokenizer.save(folder)
        if chat is not None:
            (folder / CHAT_TEMPLATE).write_text(chat.template, encoding="utf-8")
        manifest = asked.model_copy(
            update={
                "empty_documents": sum(reader.num_empty for reader in shares),
                "skipped_documents": sum(reader.num_skipped for reader in shares),
                **splits,
            }
        )
        (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for reader in shares:
        reader.tell_left_out()
    return load_manifest(out)


def _reader(
    sources: Sequence[str | Path], field: str | None, on_error: OnError, chat: ChatTemplate | None, max_bytes: int
) -> DocumentReader:
    if chat is None:
        return DocumentReader(sources, field=field or "text", on_error=on_error, max_bytes=max_bytes)

    def conversation(record: dict[str, Any], where: str) -> str:
        way_out = "a conversation is a list of messages: name its field with --field"
        messages = check_messages(field_value(record, field or "messages", where, way_out), where)
        if all(message["role"] != ASSISTANT for message in messages):
            raise ValueError(f"{where} has no message of the role {ASSISTANT!r}, and there is nothing to train on")
        return json.dumps([where, messages], default=str)

    return DocumentReader(sources, on_error=on_error, text_of=conversation, max_bytes=max_bytes)


def _write_splits(
    folder: Path,
    shares: Mapping[DocumentReader, float],
    encoder: Encoder,
    asked: Manifest,
    workers: int,
    progress: bool,
) -> dict[str, Split]:
    """The shards and document hashes of every split; returns their counts."""
    hashes: dict[SplitName, array[int]] = defaultdict(lambda: array("Q"))
    names = [name for name, is_there in _splits(shares).items() if is_there]
    writers = {name: _SplitWriter(folder / name, asked) for name in names}
    with _progress_bar(progress) as bar:
        for reader, share in shares.items():
            task = bar.add_task("tokenising", total=reader.num_bytes)
            for documents, position in encoded_chunks(reader, replace(encoder, holdout=share), workers):
                for document in documents:
                    writers[document.split].add(document)
                    hashes[document.split].append(document.hash)
                bar.update(task, completed=position)
    found: dict[str, Split] = {}
    for name, writer in writers.items():
        write_hashes(folder, name, hashes[name])
        found[name] = writer.finish_dropping() if name == "train" else writer.finish_filling()
    return found


def _check_arguments(seq_len: int, document_multiple: int, holdout: float, seed: int, workers: int) -> None:
    if seq_len < 1 or document_multiple < 1 or seq_len % document_multiple:
        raise ValueError(f"seq_len={seq_len} must be a positive multiple of document_multiple={document_multiple}")
    if not 0 <= holdout <= 1:
        raise ValueError(f"holdout={holdout} must be a share of the documents, from 0 to 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must be from 0 to 2**63 - 1")
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")


def _check_new(out: Path, asked: Manifest) -> None:
    """FileExistsError: `out` is there; of prepared data it says what differs from what is asked for."""
    if not out.exists():
        return
    file = out / MANIFEST_FILE
    if not file.is_file():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    differences = differing(parse_manifest(file, read_regular(file)), asked)
    if not differences:
        raise FileExistsError(
            f"{out} holds these data already, prepared in the same way from files of the same names and sizes; remove "
            "it to prepare them again"
        )
    raise FileExistsError(
        f"{out} holds other data:\n  - " + "\n  - ".join(differences) + "\nremove it or choose another folder"
    )


def _splits(shares: Mapping[DocumentReader, float]) -> dict[SplitName, bool]:
    """Which splits there will be."""
    return {"train": min(shares.values()) < 1, "validation": max(shares.values()) > 0}


def _check_splits(shares: Mapping[DocumentReader, float], encoder: Encoder) -> None:
    """ValueError: a split would have no document. Reads until each has one, which is soon unless that is so."""
    for reader, share in shares.items():
        wanted: set[SplitName] = {name for name, there in _splits({reader: share}).items() if there}
        different: set[str] = set()
        divider = replace(encoder, holdout=share)
        for document in reader:
            if len(different) < 2:
                different.add(divider.key_of(document.text))
            wanted.discard(divider.split_of(document.text))
            if not wanted:
                break
        if not reader.num_documents:
            files = ", ".join(map(str, reader.files[:5])) + ", …" * (len(reader.files) > 5)
            raise ValueError(
                f"{files}: no document ({reader.num_empty} empty ones and {reader.num_skipped} with errors were "
                "left out)"
            )
        if wanted:
            (name,) = wanted
            count = reader.num_documents
            equal = len(different) == 1
            which = f"all {count} documents are equal, and none" if equal else f"none of the {count} documents"
            which = "the only document never" if count == 1 else which
            raise ValueError(
                f"{which} fell to {name} with holdout={share}; documents are not divided, so give more of them (one a "
                ".txt file or .jsonl line), name files to hold out with --validation, or change holdout or seed"
            )


class _SplitWriter:
    """Packs the documents of one split and writes the sequences."""

    def __init__(self, folder: Path, data: Manifest) -> None:
        from bd3_scale.data.mosaicml import MDSWriter  # imports torch, which the workers do not need

        dtype = token_dtype(data.vocabulary)
        columns = {
            "tokens": f"ndarray:{np.dtype(dtype).name}:{data.seq_len}",
            "document_lengths": "ndarray:int32",
            "counted_lengths": "ndarray:int32",
        }
        if data.messages or data.vocabulary.bos_id is not None:
            columns["shown"] = "ndarray:int32"
        self._columns = tuple(columns)
        self._packer = Packer(data.seq_len, data.document_multiple, data.vocabulary.eos_id, dtype)
        self._shards = MDSWriter(
            out=str(folder), columns=columns, compression="zstd", hashes=["xxh64"], size_limit=SHARD_BYTES
        )
        self.num_documents = self._num_sequences = self._num_counted = self._num_shown = self._num_text_bytes = 0
        self._num_dropped = 0

    def add(self, document: EncodedDocument) -> None:
        self.num_documents += 1
        self._num_text_bytes += document.num_bytes
        self._write(self._packer.add(document.ids, document.shown, trains_end=document.trains_end))

    def finish_dropping(self) -> Split:
        """Leave the incomplete sequence out."""
        dropped = self._packer.num_pending
        if not self._num_sequences:
            raise ValueError(
                f"the documents for training fill {dropped} tokens, less than one sequence of seq_len="
                f"{self._packer.seq_len}; give more text or choose a shorter seq_len"
            )
        return self._finish(dropped)

    def finish_filling(self) -> Split:
        """Complete the incomplete sequence with tokens that do not count."""
        self._write(self._packer.fill())
        if not self._num_sequences:
            raise ValueError("the held-out conversations have no sequence with an answer; give more or longer ones")
        return self._finish(0)

    def _write(self, sequences: Iterator[PackedSequence]) -> None:
        for sequence in sequences:
            if sequence.num_shown == len(sequence.tokens):
                # Nothing of it could be learnt or measured, as of a long text that a person hands in.
                self._num_dropped += len(sequence.tokens)
                continue
            self._shards.write({name: getattr(sequence, name) for name in self._columns})
            self._num_sequences += 1
            self._num_counted += sequence.num_counted
            self._num_shown += sequence.num_shown

    def _finish(self, dropped: int) -> Split:
        self._shards.finish()
        return Split(
            documents=self.num_documents,
            sequences=self._num_sequences,
            counted_tokens=self._num_counted,
            shown_tokens=self._num_shown,
            dropped_tokens=dropped + self._num_dropped,
            text_bytes=self._num_text_bytes,
        )


def _progress_bar(enabled: bool) -> Progress:
    columns = (
        label("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not enabled)
