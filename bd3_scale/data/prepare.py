"""From documents to sharded token sequences: read, tokenise in parallel, split by document, pack, write MDS shards."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from array import array
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bd3_scale.data.manifest import MANIFEST_FILE, Manifest, Source, Split, SplitName
from bd3_scale.data.overlap import document_hash, write_hashes
from bd3_scale.data.packing import PackedSequence, Packer
from bd3_scale.data.sources import DocumentReader
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.resilience.files import new_folder

CHUNK_CHARACTERS = 1 << 20
SHARD_BYTES = 1 << 26


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
) -> Manifest:
    """Tokenise the documents of `sources` into the new folder `out`: the MDS shards of `train/` and `validation/`, the
    tokeniser, the hashes of documents and the manifest.

    A sample holds `tokens` [seq_len] (uint16; uint32 for a vocabulary above 65,536), `document_lengths` and
    `counted_lengths` (int32, see `PackedSequence`). Documents keep their order: training shuffles the sequences. The
    share `holdout` of the documents goes to `validation`, by a hash of text and `seed`, so that equal documents go to
    one side; 0 holds out none, 1 all. Where the sources `validation` are given, they are held out in place of a share.
    The last, incomplete sequence is dropped from `train`, and filled in `validation` with tokens that do not count. The
    result does not depend on `workers` (processes; default: the usable CPUs).

    Raises FileExistsError if `out` exists; ValueError for arguments out of range, sources that cannot be read (see
    `DocumentReader`) and a split that would be empty. `out` exists afterwards only if all went well.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    _check_arguments(seq_len, document_multiple, holdout, seed, workers)
    shares = {DocumentReader(sources): 0.0 if validation else holdout}
    if validation:
        shares[DocumentReader(validation)] = 1.0
    with new_folder(Path(out)) as folder:
        writers: dict[SplitName, _SplitWriter] = {}
        hashes: dict[SplitName, array[int]] = defaultdict(lambda: array("Q"))
        if min(shares.values()) < 1:
            writers["train"] = _SplitWriter(folder / "train", tokenizer.vocabulary, seq_len, document_multiple)
        if max(shares.values()) > 0:
            writers["validation"] = _SplitWriter(
                folder / "validation", tokenizer.vocabulary, seq_len, document_multiple
            )
        with _progress_bar(progress) as bar:
            for reader, share in shares.items():
                task = bar.add_task("tokenising", total=reader.num_bytes)
                for documents, position in _encoded_chunks(reader, _Encoder(tokenizer, share, seed), workers):
                    for document in documents:
                        writers[document.split].add(document)
                        hashes[document.split].append(document.hash)
                    bar.update(task, completed=position)
        _check_documents(writers, shares)
        tokenizer.save(folder)
        for split in writers:
            write_hashes(folder, split, hashes[split])
        files = [file for reader in shares for file in reader.files]
        manifest = Manifest(
            vocabulary=tokenizer.vocabulary,
            tokenizer_hash=tokenizer.hash,
            seq_len=seq_len,
            document_multiple=document_multiple,
            holdout=0.0 if validation else holdout,
            seed=seed,
            empty_documents=sum(reader.num_empty for reader in shares),
            sources=tuple(Source(path=str(file), bytes=file.stat().st_size) for file in files),
            train=writers["train"].finish_dropping() if "train" in writers else None,
            validation=writers["validation"].finish_filling() if "validation" in writers else None,
        )
        (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def _check_arguments(seq_len: int, document_multiple: int, holdout: float, seed: int, workers: int) -> None:
    if seq_len < 1 or document_multiple < 1 or seq_len % document_multiple:
        raise ValueError(f"seq_len={seq_len} must be a positive multiple of document_multiple={document_multiple}")
    if not 0 <= holdout <= 1:
        raise ValueError(f"holdout={holdout} must be a share of the documents, from 0 to 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must be from 0 to 2**63 - 1")
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")


def _check_documents(writers: dict[SplitName, _SplitWriter], shares: dict[DocumentReader, float]) -> None:
    for reader in shares:
        if not reader.num_documents:
            files = ", ".join(map(str, reader.files[:5])) + ", …" * (len(reader.files) > 5)
            raise ValueError(f"{files}: no document ({reader.num_empty} empty ones were skipped)")
    for name, writer in writers.items():
        if not writer.num_documents:
            (share,) = shares.values()
            raise ValueError(
                f"none of the {sum(reader.num_documents for reader in shares)} documents fell to {name} with "
                f"holdout={share}; documents are not divided, so give more of them (one a .txt file or .jsonl line), "
                f"name files to hold out, or change holdout or seed"
            )


def _token_dtype(vocabulary: Vocabulary) -> type[np.unsignedinteger]:
    return np.uint16 if vocabulary.size <= 1 << 16 else np.uint32


@dataclass(frozen=True)
class _EncodedDocument:
    ids: NDArray[np.unsignedinteger]
    num_bytes: int
    split: SplitName
    hash: int


class _Encoder:
    """Texts to token ids and splits: all that runs in the worker processes."""

    def __init__(self, tokenizer: Tokenizer, holdout: float, seed: int) -> None:
        self._tokenizer, self._threshold, self._key = tokenizer, holdout * 2**64, seed.to_bytes(8, "big")
        self._dtype = _token_dtype(tokenizer.vocabulary)

    def __call__(self, texts: list[str]) -> list[_EncodedDocument]:
        return [self._document(*pair) for pair in zip(texts, self._tokenizer.encode_batch(texts), strict=True)]

    def _document(self, text: str, ids: list[int]) -> _EncodedDocument:
        data = text.encode("utf-8")
        draw = int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._key).digest(), "big")
        split: SplitName = "validation" if draw < self._threshold else "train"
        return _EncodedDocument(np.array(ids, self._dtype), len(data), split, document_hash(text))


def _encoded_chunks(
    reader: DocumentReader, encoder: _Encoder, workers: int
) -> Iterator[tuple[list[_EncodedDocument], int]]:
    """The documents in order, with the bytes of the source files they were read from so far."""
    if workers == 1:
        for texts, position in _chunks(reader):
            yield encoder(texts), position
        return
    # Spawned, because forking a process that has threads (the progress bar, torch) can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encoder,)) as pool:
        pending: deque[tuple[Future[list[_EncodedDocument]], int]] = deque()
        for texts, position in _chunks(reader):
            pending.append((pool.submit(_encode_in_worker, texts), position))
            if len(pending) > 2 * workers:
                future, done = pending.popleft()
                yield future.result(), done
        for future, done in pending:
            yield future.result(), done


def _chunks(reader: DocumentReader) -> Iterator[tuple[list[str], int]]:
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


_worker_encoder: _Encoder


def _start_worker(encoder: _Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> list[_EncodedDocument]:
    return _worker_encoder(texts)


class _SplitWriter:
    """Packs the documents of one split and writes the sequences."""

    def __init__(self, folder: Path, vocabulary: Vocabulary, seq_len: int, document_multiple: int) -> None:
        from bd3_scale.data.mosaicml import MDSWriter  # imports torch, which the workers do not need

        dtype = _token_dtype(vocabulary)
        columns = {
            "tokens": f"ndarray:{np.dtype(dtype).name}:{seq_len}",
            "document_lengths": "ndarray:int32",
            "counted_lengths": "ndarray:int32",
        }
        self._packer = Packer(seq_len, document_multiple, vocabulary.eos_id, dtype)
        self._shards = MDSWriter(
            out=str(folder), columns=columns, compression="zstd", hashes=["xxh64"], size_limit=SHARD_BYTES
        )
        self.num_documents = self._num_sequences = self._num_counted = self._num_text_bytes = 0

    def add(self, document: _EncodedDocument) -> None:
        self.num_documents += 1
        self._num_text_bytes += document.num_bytes
        self._write(self._packer.add(document.ids))

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
        return self._finish(0)

    def _write(self, sequences: Iterator[PackedSequence]) -> None:
        for sequence in sequences:
            self._shards.write(vars(sequence))
            self._num_sequences += 1
            self._num_counted += int(sequence.counted_lengths.sum())

    def _finish(self, dropped: int) -> Split:
        self._shards.finish()
        return Split(
            documents=self.num_documents,
            sequences=self._num_sequences,
            counted_tokens=self._num_counted,
            dropped_tokens=dropped,
            text_bytes=self._num_text_bytes,
        )


def _progress_bar(enabled: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not enabled)
