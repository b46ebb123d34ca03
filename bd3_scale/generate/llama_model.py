"""Run a block diffusion model in llama.cpp, behind the interface of the PyTorch model: a cache of blocks, passes and
losses.

llama.cpp's own programs know two kinds of attention: causal, and a whole text at once. Through its C API a pass can be
non-causal, and sequence ids control what its rows see: a row sees the cached rows that belong to one of its sequences.
Thus

- each text is a sequence. A denoising pass writes the block into it and removes it again; a finished block stays.
- several clean blocks go in one pass, which is much faster than one by one. Block j belongs to the scratch sequences
  j … n − 1, and the first of these decides what it sees: the blocks up to j. The API does not promise which one of
  several sequences decides (it follows from an `unordered_set` in its source), so `_probe` tests it when a model is
  loaded.

Checked against the PyTorch model: logits of a float32 file with a float32 cache and without flash attention differ by
1e-5.

Legend: B texts, L' tokens per block, M positions whose logits are wanted, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bd3_scale.generate import llama_cpp
from bd3_scale.model.rows import ModelInputs
from bd3_scale.recipe.vocabulary import Vocabulary

CHUNK = 8  # most clean blocks of one pass, and number of scratch sequences
CHUNK_ROWS = 256
_FIRST_TEXT = CHUNK  # sequence of the first text; those below are scratch sequences
_CELL_MULTIPLE = 256  # llama.cpp pads caches to a multiple of it
# `_probe` accepts a hypothesis if its error is below this share of the other one's: rounding leaves far less than 5%,
# and a wrong mask changes logits completely.
_ACCEPTED_SHARE = 0.05


class LlamaCache:
    """Holds the finished blocks of texts, as `KVCache` does for the PyTorch model; each text is one llama.cpp
    sequence."""

    def __init__(self, context: llama_cpp.Context, texts: int, own_first: bool) -> None:
        self.context = context
        self.lengths = [0] * texts
        self._slots = range(_FIRST_TEXT, _FIRST_TEXT + texts)
        self._sequences = list(self._slots)
        self._ends = [0] * texts  # the next position; larger than `lengths` once a window has dropped rows
        self._own_first = own_first

    def positions(self, starts: Sequence[int], size: int) -> Tensor:
        """Return the positions from each text's start on, int64 [B, size]."""
        return torch.tensor(starts)[:, None] + torch.arange(size)

    def add(self) -> None:
        """Add a text behind the others, in a slot that `keep` freed."""
        self._sequences.append(min(set(self._slots) - set(self._sequences)))
        self.lengths.append(0)
        self._ends.append(0)

    def swap(self, first: int, second: int) -> None:
        """Swap two texts."""
        for values in (self._sequences, self.lengths, self._ends):
            values[first], values[second] = values[second], values[first]

    def keep(self, texts: Sequence[int]) -> None:
        """Keep these texts alone, in this order."""
        for text in set(range(len(self.lengths))) - set(texts):
            self.context.remove(self._sequences[text])
        self.lengths, self._sequences, self._ends = (
            [values[text] for text in texts] for values in (self.lengths, self._sequences, self._ends)
        )

    def forget(self, text: int, rows: int) -> None:
        """Drop the first `rows` rows of a text."""
        start = self._ends[text] - self.lengths[text]
        self.context.remove(self._sequences[text], start, start + rows)
        self.lengths[text] -= rows

    def commit(self, rows: Sequence[int]) -> None:
        """Keep the first `rows` of each text's last written rows; the next `write` removes the others."""
        for text, more in enumerate(rows):
            self.lengths[text] += more
            self._ends[text] += more

    def write(self, blocks: NDArray[np.int64], starts: Sequence[int], wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Write a block [L'] of each text behind its cached rows, from its own start on; return the wanted logits,
        float32 [M, V].
        """
        size = blocks.shape[1]
        for text, start in enumerate(starts):
            self._ends[text] = start
            self.context.remove(self._sequences[text], start)  # rows of the pass before that were not committed
        return self.context.decode(
            blocks.reshape(-1).tolist(),
            [start + offset for start in starts for offset in range(size)],
            [[sequence] for sequence in self._sequences[: len(starts)] for _ in range(size)],
            wanted.reshape(-1).tolist(),
        )

    def append(
        self,
        text: int,
        start: int,
        blocks: Sequence[NDArray[np.int64]],
        noisy: Sequence[NDArray[np.int64]] = (),
        wanted: Sequence[NDArray[np.bool_]] = (),
    ) -> list[NDArray[np.float32]]:
        """Write clean blocks behind a text's rows, from position `start` on, several in one pass.

        noisy, wanted: for each clean block, a noisy one at the same positions and the positions whose logits are
        wanted. A noisy block sees itself and the clean blocks before it. Returns their logits, float32 [M, V] for each
        pass.
        """
        context, home, logits = self.context, self._sequences[text], []
        self._ends[text] = start
        context.remove(home, start)
        per_pass = max(1, min(CHUNK, CHUNK_ROWS // max(map(len, blocks), default=1)))
        for first in range(0, len(blocks), per_pass):
            part = slice(first, first + per_pass)
            # The last scratch sequences: then each set of sequences is one that `_probe` has tested.
            scratch = range(CHUNK - len(blocks[part]), CHUNK)
            begin = self._ends[text]
            before = [home, *scratch]
            for sequence in scratch:
                context.copy(home, sequence)
            starts = np.cumsum([begin, *map(len, blocks[part])]).tolist()
            tokens = np.concatenate(blocks[part]).tolist()
            sequences = [
                _scratch_sequences(visible, self._own_first)
                for visible, block in zip(scratch, blocks[part], strict=True)
                for _ in range(len(block))
            ]
            positions = range(begin, starts[-1])
            context.decode(tokens, positions, sequences, [False] * len(tokens))
            if noisy:
                logits.append(self._noisy(before, starts[:-1], noisy[part], wanted[part]))
            context.copy(scratch[-1], home, begin)
            for sequence in scratch:
                context.remove(sequence)
            self.lengths[text] += starts[-1] - begin
            self._ends[text] = starts[-1]
        return logits

    def _noisy(
        self,
        before: Sequence[int],
        starts: Sequence[int],
        blocks: Sequence[NDArray[np.int64]],
        wanted: Sequence[NDArray[np.bool_]],
    ) -> NDArray[np.float32]:
        """Return the logits of one pass over noisy blocks, each in the sequence that holds the clean blocks before
        it."""
        rows: list[tuple[int, int, int, bool]] = []
        for sequence, start, block, want in zip(before, starts, blocks, wanted, strict=False):
            rows += [(int(token), start + i, sequence, bool(want[i])) for i, token in enumerate(block)]
        tokens, positions, sequences, outputs = zip(*rows, strict=True)
        logits = self.context.decode(tokens, positions, [[sequence] for sequence in sequences], outputs)
        for sequence, start in zip(before, starts, strict=False):
            self.context.remove(sequence, start)
        return logits


class LlamaModel(nn.Module):
    """A model that llama.cpp runs, for `denoise` and `evaluate_nelbo`; logits of ids that are no clean token are −∞.

    Args:
        exact: see `llama_cpp.Context`.

    ValueError: this build of llama.cpp handles sequences in an unknown way, see `_probe`.
    """

    def __init__(
        self, opened: llama_cpp.Model, vocabulary: Vocabulary, *, block_size: int, threads: int, exact: bool
    ) -> None:
        super().__init__()
        self._opened, self._threads, self._exact, self._block_size = opened, threads, exact, block_size
        self.vocabulary = vocabulary
        ids = np.arange(opened.num_tokens)
        self._forbidden = (ids == vocabulary.mask_id) | (ids >= vocabulary.size)
        # Callers find the device of a model's inputs by its parameters; llama.cpp's weights are none of PyTorch's.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        self._context: llama_cpp.Context | None = None
        self._own_first = True
        self._own_first = self._probe()

    def close(self) -> None:
        """Free the memory of caches and weights."""
        self._close_context()
        self._opened.close()

    def _close_context(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None

    def new_cache(self, batch_size: int, capacity: int) -> LlamaCache:
        """Return an empty cache for `capacity` positions of each text; the cache before is closed."""
        return self._cache(batch_size, capacity, self._block_size)

    def _cache(self, texts: int, capacity: int, block_size: int) -> LlamaCache:
        self._close_context()
        if texts > llama_cpp.MOST_SEQUENCES - _FIRST_TEXT:
            raise ValueError(
                f"llama.cpp holds {llama_cpp.MOST_SEQUENCES - _FIRST_TEXT} texts at once, not {texts}: generate fewer "
                "at a time"
            )
        # The cache needs room for a pass besides what is kept: a block of each text, or several blocks of one.
        rows = max(2 * CHUNK_ROWS, texts * block_size)
        cells = -(-(texts * capacity + rows) // _CELL_MULTIPLE) * _CELL_MULTIPLE
        self._context = llama_cpp.Context(
            self._opened,
            cells=cells,
            rows=rows,
            sequences=_FIRST_TEXT + texts,
            threads=self._threads,
            exact=self._exact,
        )
        return LlamaCache(self._context, texts, self._own_first)

    def prefill(self, block_BL: Tensor, positions_BL: Tensor, cache: LlamaCache) -> None:
        """Append a clean block of each text, as `BlockDiffusionTransformer.prefill` does."""
        cache.write(block_BL.numpy(), positions_BL[:, 0].tolist(), np.zeros(tuple(block_BL.shape), dtype=np.bool_))
        cache.commit([block_BL.shape[1]] * len(block_BL))

    def append(self, blocks_BL: Tensor, positions_BL: Tensor, cache: LlamaCache, text: int) -> None:
        """Append clean blocks of one text, as `BlockDiffusionTransformer.append` does."""
        cache.append(text, int(positions_BL[0, 0]), list(blocks_BL.numpy()))

    def decode(
        self, block_BL: Tensor, positions_BL: Tensor, cache: LlamaCache, wanted_BL: Tensor | None = None
    ) -> Tensor:
        """Return logits fp32 [M, V] at the wanted positions of a block that sees the cached rows and itself."""
        wanted = np.ones(tuple(block_BL.shape), dtype=np.bool_) if wanted_BL is None else wanted_BL.numpy()
        return self._logits(cache.write(block_BL.numpy(), positions_BL[:, 0].tolist(), wanted))

    @torch.no_grad()
    def forward(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the head rows' losses, and each loss, fp32 [M].

        This is `BlockDiffusionTransformer.forward` for one noisy copy.
        """
        if inputs.row_loss is not None or inputs.num_noisy != 1:
            raise ValueError("with llama.cpp only the likelihood of masked tokens can be measured")
        losses = torch.zeros(len(inputs.targets))
        for rows, logits in self.head_logits(inputs):
            losses[rows] = -logits.log_softmax(-1).gather(-1, inputs.targets[rows][:, None])[:, 0]
        return (losses * inputs.weights).sum(), losses

    def head_logits(self, inputs: ModelInputs) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield indices of head rows, int64 [M], and their logits, fp32 [M, V], document by document."""
        longest = int((inputs.spans[2] - inputs.spans[1]).max())
        cache = self._cache(1, inputs.positions.shape[1], longest)
        for document in _documents(inputs):
            wanted = [rows >= 0 for rows in document.head_rows]
            if document.clean:
                logits = cache.append(0, document.position, document.clean, document.noisy, wanted)
            else:
                logits = [cache.write(document.noisy[0][None], [document.position], wanted[0][None])]
            rows = np.concatenate(document.head_rows)
            yield torch.from_numpy(rows[rows >= 0]), self._logits(np.concatenate(logits))

    def _logits(self, logits: NDArray[np.float32]) -> Tensor:
        """Exclude ids that are no clean token, as the PyTorch model's head does: the mask and the padding."""
        logits[:, self._forbidden] = -np.inf
        return torch.from_numpy(logits)

    def _probe(self) -> bool:
        """Test by experiment whether the first or the last of a row's sequences decides what the row sees.

        Tokens are decoded one by one, each seeing those before it, which needs no assumption. Then all go in one pass,
        with their sequences ordered for either hypothesis; the right one gives the same logits. Two further passes test
        that a pass is not causal, and that a sequence may have several outputs (`n_outputs_max_per_seq` of newer
        releases).

        Returns whether the first decides.
        ValueError: neither does, a pass is causal, or a sequence has only one output.
        """
        count = min(CHUNK, self.vocabulary.size - 1)
        tokens = [token for token in range(count + 1) if token != self.vocabulary.mask_id][:count]
        scratch = range(CHUNK - count, CHUNK)
        home, every = [_FIRST_TEXT], [True] * count
        context = self._cache(1, _CELL_MULTIPLE, 1).context
        expected = np.concatenate([context.decode([t], [i], [home], [True]) for i, t in enumerate(tokens)])
        errors = {}
        for own_first in (True, False):
            context.clear()
            sequences = [_scratch_sequences(sequence, own_first) for sequence in scratch]
            errors[own_first] = _distance(context.decode(tokens, range(count), sequences, every), expected)
        context.clear()
        pair = context.decode(tokens[:2], range(2), [home] * 2, [True] * 2)
        context.clear()
        second = context.decode(tokens[:2], range(2), [home] * 2, [False, True])
        right, wrong = sorted(errors.values())
        seen = _distance(pair[:1], expected[:1])
        if not (
            right <= _ACCEPTED_SHARE * wrong
            and right <= _ACCEPTED_SHARE * seen
            and _distance(second, pair[1:]) <= _ACCEPTED_SHARE * seen
        ):
            raise ValueError(
                f"this build of llama.cpp handles sequences in an unknown way (errors {errors}, effect of the next "
                f"token {seen:g}): use {llama_cpp.PACKAGE} {llama_cpp.RELEASE}, on a machine that it was built for"
            )
        return min(errors, key=errors.__getitem__)


@dataclass(frozen=True)
class _Document:
    """A document of a text, block by block. head_rows: the head's row of each position, −1 for none.

    clean: its clean blocks; empty if no block sees another one.
    """

    position: int
    noisy: list[NDArray[np.int64]]
    clean: list[NDArray[np.int64]]
    head_rows: list[NDArray[np.int64]]


def _documents(inputs: ModelInputs) -> Iterator[_Document]:
    """Yield the documents that have a row of the head, up to the last block with one."""
    texts, length = inputs.positions.shape
    head_rows = np.full((texts, length), -1, dtype=np.int64)
    rows = inputs.head_rows.numpy()
    head_rows[rows % texts, rows // texts] = np.arange(len(rows))
    tokens, starts, ends = inputs.tokens.numpy(), *inputs.spans[[0, 2]].numpy()
    for text in range(texts):
        for start in np.unique(starts[text]):
            wanted = np.flatnonzero((starts[text] == start) & (head_rows[text] >= 0))
            if not len(wanted):
                continue
            end = int(ends[text, wanted[-1]])
            edges = np.unique(ends[text, start:end])[:-1] - start
            yield _Document(
                int(inputs.positions[text, start]),
                np.split(tokens[text, start:end], edges),
                np.split(tokens[text, length + start : length + end], edges) if inputs.num_streams == 2 else [],
                np.split(head_rows[text, start:end], edges),
            )


def _scratch_sequences(sequence: int, own_first: bool) -> list[int]:
    """Return the scratch sequences of a clean block, ordered so that `sequence` decides what it sees."""
    others = list(range(sequence + 1, CHUNK))
    return [sequence, *others] if own_first else [*others, sequence]


def _distance(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    # The median over rows: rounding sometimes routes a row to another expert, which changes that row completely.
    return float(np.median(np.abs(logits - expected).mean(-1)))
