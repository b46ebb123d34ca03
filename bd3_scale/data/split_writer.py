"""Pack the sequences of one split and write them as MDS shards."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bd3_scale.data.encode import EncodedDocument, token_dtype
from bd3_scale.data.manifest import Counts, Manifest, SplitName
from bd3_scale.data.overlap import write_hashes
from bd3_scale.data.packing import PACKERS, PackedSequence

SHARD_BYTES = 1 << 26


class SplitWriter:
    """Packs the documents of one split into sequences; writes these and the documents' hashes into `folder`."""

    def __init__(self, folder: Path, split: SplitName, data: Manifest) -> None:
        from bd3_scale.data.mosaicml import MDSWriter  # imports torch, which encoding processes do not need

        dtype = token_dtype(data.vocabulary)
        columns = {
            "tokens": f"ndarray:{np.dtype(dtype).name}:{data.seq_len}",
            "document_lengths": "ndarray:int32",
            "counted_lengths": "ndarray:int32",
        }
        # Training on filling would teach that documents are empty. Concatenated, only the last sequence has any, and
        # it is dropped; in evaluation filling does not count.
        shows_filling = split == "train" and data.packing != "concatenate"
        if data.messages or data.vocabulary.bos_id is not None or shows_filling:
            columns["shown"] = "ndarray:int32"
        self._folder, self._split = folder, split
        self._columns = tuple(columns)
        self._packer = PACKERS[data.packing](
            data.seq_len, data.document_multiple, data.vocabulary.eos_id, dtype, shows_filling=shows_filling
        )
        self._drops_incomplete = split == "train" and data.packing == "concatenate"
        self._shards = MDSWriter(
            out=str(folder / split), columns=columns, compression="zstd", hashes=["xxh64"], size_limit=SHARD_BYTES
        )
        self._hashes = array("Q")
        self._num_sequences = self._num_counted = self._num_shown = self._num_text_bytes = self._num_dropped = 0

    def add(self, document: EncodedDocument) -> None:
        """Append a document and write the sequences that it completes."""
        self._hashes.append(document.hash)
        self._num_text_bytes += document.num_bytes
        self._write(self._packer.add(document.ids, document.shown, trains_end=document.trains_end))

    def finish(self) -> Counts:
        """Drop the incomplete sequence at the end of concatenated training documents, or else complete it.

        Returns the counts of what was written.
        """
        if self._drops_incomplete:
            self._num_dropped += self._packer.num_pending
        else:
            self._write(self._packer.fill())
        self._shards.finish()
        write_hashes(self._folder, self._split, self._hashes)
        return Counts(
            documents=len(self._hashes),
            sequences=self._num_sequences,
            counted_tokens=self._num_counted,
            shown_tokens=self._num_shown,
            dropped_tokens=self._num_dropped,
            text_bytes=self._num_text_bytes,
        )

    def _write(self, sequences: Iterator[PackedSequence]) -> None:
        for sequence in sequences:
            num_shown = sequence.num_shown
            if num_shown == len(sequence.tokens):
                # Nothing in it would be trained on or measured, as in a long text that a user pasted.
                self._num_dropped += len(sequence.tokens)
                continue
            self._shards.write({name: getattr(sequence, name) for name in self._columns})
            self._num_sequences += 1
            self._num_counted += sequence.num_counted
            self._num_shown += num_shown
