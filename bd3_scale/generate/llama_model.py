"""A block diffusion model that llama.cpp runs, with the face of our own: a cache of blocks, passes and losses.

llama.cpp's own programs know causal attention and a whole text seen at once. Through its C API a pass is not causal,
and what its rows see is told by sequences: a row sees the rows that belong to one of its own sequences. So

- each text is a sequence. A denoising pass puts the block into it, and takes it out again; a finished block stays.
- several clean blocks go in one pass. Block j belongs to the scratch sequences j … n − 1, of which the first decides
  what it sees: the blocks up to itself. Which one of several decides is not promised by the API: `_probe` tries it.

Legend: B texts, L' tokens a block, M places whose logits are wanted, V entries of the vocabulary.
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

CHUNK = 8  # clean blocks that go in one pass at the most, and scratch sequences
CHUNK_ROWS = 256
_HOME = CHUNK  # sequences below are scratch
_CELLS = 256  # a multiple of which llama.cpp's caches have
# Of the error of the wrong hypothesis: what rounding may leave of the right one.
_CLEAR = 0.05


class LlamaCache:
    """Hold the finished blocks of texts, as `KVCache` does for our own model, one sequence of llama.cpp each."""

    def __init__(self, context: llama_cpp.Context, texts: int, own_first: bool) -> None:
        self.context = context
        self.lengths = [0] * texts
        self._slots = range(_HOME, _HOME + texts)
        self._sequences = list(self._slots)
        self._ends = [0] * texts  # positions; a window has forgotten the first ones
        self._own_first = own_first

    def positions(self, starts: Sequence[int], size: int) -> Tensor:
        """Return int64 [B, size], the positions from each text's start on."""
        return torch.tensor(starts)[:, None] + torch.arange(size)

    def add(self) -> None:
        """Begin a text behind the others, in a place that `keep` freed."""
        self._sequences.append(min(set(self._slots) - set(self._sequences)))
        self.lengths.append(0)
        self._ends.append(0)

    def swap(self, first: int, second: int) -> None:
        """Let two texts change places."""
        for values in (self._sequences, self.lengths, self._ends):
            values[first], values[second] = values[second], values[first]

    def keep(self, texts: Sequence[int]) -> None:
        """Go on with these texts alone."""
        for text in set(range(len(self.lengths))) - set(texts):
            self.context.remove(self._sequences[text])
        self.lengths, self._sequences, self._ends = (
            [values[text] for text in texts] for values in (self.lengths, self._sequences, self._ends)
        )

    def forget(self, text: int, rows: int) -> None:
        """Drop the first so many rows of a text."""
        start = self._ends[text] - self.lengths[text]
        self.context.remove(self._sequences[text], start, start + rows)
        self.lengths[text] -= rows

    def commit(self, rows: Sequence[int]) -> None:
        """Keep the first so many of each text's last written rows; `write` takes the others out."""
        for text, more in enumerate(rows):
            self.lengths[text] += more
            self._ends[text] += more

    def write(self, blocks: NDArray[np.int64], starts: Sequence[int], wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Put a block [L'] of each text behind its rows, from a position of its own on, and return the wanted logits,
        float32 [M, V].
        """
        size = blocks.shape[1]
        for text, start in enumerate(starts):
            self._ends[text] = start
            self.context.remove(self._sequences[text], start)  # what the pass before left
        return self.context.decode(
            blocks.reshape(-1).tolist(),
            [start + place for start in starts for place in range(size)],
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
        """Put clean blocks behind a text's rows, from position `start` on, several a pass.

        noisy, wanted: block by block what is in the places of each clean one, whose logits are returned, float32 [M, V]
        of each pass: a noisy block sees itself and the clean ones before its own.
        """
        context, home, found = self.context, self._sequences[text], []
        self._ends[text] = start
        context.remove(home, start)
        per_pass = max(1, min(CHUNK, CHUNK_ROWS // max(map(len, blocks), default=1)))
        for first in range(0, len(blocks), per_pass):
            part = slice(first, first + per_pass)
            # The last ones, so that each pattern of sequences is one that was probed.
            scratch = range(CHUNK - len(blocks[part]), CHUNK)
            begin = self._ends[text]
            before = [home, *scratch]
            for sequence in scratch:
                context.copy(home, sequence)
            starts = np.cumsum([begin, *map(len, blocks[part])]).tolist()
            tokens = np.concatenate(blocks[part]).tolist()
            sequences = [
                _patterns(own, self._own_first)
                for own, block in zip(scratch, blocks[part], strict=True)
                for _ in range(len(block))
            ]
            positions = range(begin, starts[-1])
            context.decode(tokens, positions, sequences, [False] * len(tokens))
            if noisy:
                found.append(self._noisy(before, starts[:-1], noisy[part], wanted[part]))
            context.copy(scratch[-1], home, begin)
            for sequence in scratch:
                context.remove(sequence)
            self.lengths[text] += starts[-1] - begin
            self._ends[text] = starts[-1]
        return found

    def _noisy(
        self,
        before: Sequence[int],
        starts: Sequence[int],
        blocks: Sequence[NDArray[np.int64]],
        wanted: Sequence[NDArray[np.bool_]],
    ) -> NDArray[np.float32]:
        """Return the logits of one pass of noisy blocks, each in the sequence that holds what is before it."""
        rows: list[tuple[int, int, int, bool]] = []
        for of, start, block, want in zip(before, starts, blocks, wanted, strict=False):
            rows += [(int(token), start + place, of, bool(want[place])) for place, token in enumerate(block)]
        tokens, positions, sequences, outputs = zip(*rows, strict=True)
        found = self.context.decode(tokens, positions, [[of] for of in sequences], outputs)
        for of, start in zip(before, starts, strict=False):
            self.context.remove(of, start)
        return found


class LlamaModel(nn.Module):
    """A model in llama.cpp's hands, for `denoise` and `evaluate_nelbo`: logits are −∞ where no clean token is.

    Args:
        exact: see `llama_cpp.Context`.

    ValueError: this build of llama.cpp does not compute block diffusion passes in a way that is known.
    """

    def __init__(
        self, opened: llama_cpp.Model, vocabulary: Vocabulary, *, block_size: int, threads: int, exact: bool
    ) -> None:
        super().__init__()
        self._opened, self._threads, self._exact, self._block_size = opened, threads, exact, block_size
        self.vocabulary = vocabulary
        ids = np.arange(opened.num_tokens)
        self._forbidden = (ids == vocabulary.mask_id) | (ids >= vocabulary.size)
        # Tells where its inputs lie, as the weights of other models do.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        self._context: llama_cpp.Context | None = None
        self._own_first = True
        self._own_first = self._probe()

    def close(self) -> None:
        """Give the memory of caches and weights back."""
        self._close_context()
        self._opened.close()

    def _close_context(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None

    def new_cache(self, batch_size: int, capacity: int) -> LlamaCache:
        """Return an empty cache for `capacity` positions of each text; the one before is gone."""
        return self._cache(batch_size, capacity, self._block_size)

    def _cache(self, texts: int, capacity: int, block_size: int) -> LlamaCache:
        self._close_context()
        if texts > llama_cpp.MOST_SEQUENCES - _HOME:
            raise ValueError(
                f"llama.cpp holds {llama_cpp.MOST_SEQUENCES - _HOME} texts at once, not {texts}: write fewer at a time"
            )
        # A block of each text, or a pass of several blocks, lies beside what is kept.
        rows = max(2 * CHUNK_ROWS, texts * block_size)
        cells = -(-(texts * capacity + rows) // _CELLS) * _CELLS
        self._context = llama_cpp.Context(
            self._opened, cells=cells, rows=rows, sequences=_HOME + texts, threads=self._threads, exact=self._exact
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
        """Return logits fp32 [M, V] of the wanted places of a block that sees the cached rows and itself."""
        wanted = np.ones(tuple(block_BL.shape), dtype=np.bool_) if wanted_BL is None else wanted_BL.numpy()
        return self._logits(cache.write(block_BL.numpy(), positions_BL[:, 0].tolist(), wanted))

    @torch.no_grad()
    def forward(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Return what `BlockDiffusionTransformer.forward` does of one noisy copy: the weighted sum of the head's rows'
        losses, and each of them, fp32 [M].
        """
        if inputs.row_loss is not None or inputs.num_noisy != 1:
            raise ValueError("llama.cpp measures the likelihood of masked tokens alone")
        losses = torch.zeros(len(inputs.targets))
        for rows, logits in self.head_logits(inputs):
            losses[rows] = -logits.log_softmax(-1).gather(-1, inputs.targets[rows][:, None])[:, 0]
        return (losses * inputs.weights).sum(), losses

    def head_logits(self, inputs: ModelInputs) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield numbers of rows of the head, int64 [M], and their logits, fp32 [M, V], document after document."""
        longest = int((inputs.spans[2] - inputs.spans[1]).max())
        cache = self._cache(1, inputs.positions.shape[1], longest)
        for document in _documents(inputs):
            wanted = [rows >= 0 for rows in document.head_rows]
            if document.clean:
                found = cache.append(0, document.position, document.clean, document.noisy, wanted)
            else:
                found = [cache.write(document.noisy[0][None], [document.position], wanted[0][None])]
            rows = np.concatenate(document.head_rows)
            yield torch.from_numpy(rows[rows >= 0]), self._logits(np.concatenate(found))

    def _logits(self, found: NDArray[np.float32]) -> Tensor:
        found[:, self._forbidden] = -np.inf
        return torch.from_numpy(found)

    def _probe(self) -> bool:
        """Return whether the first of a row's sequences decides what it sees; else the last does.

        ValueError: neither does, a pass is causal, or a sequence has one output alone.
        """
        count = min(CHUNK, self.vocabulary.size - 1)
        tokens = [token for token in range(count + 1) if token != self.vocabulary.mask_id][:count]
        scratch = range(CHUNK - count, CHUNK)
        home, every = [_HOME], [True] * count
        context = self._cache(1, _CELLS, 1).context
        alone = np.concatenate([context.decode([t], [i], [home], [True]) for i, t in enumerate(tokens)])
        errors = {}
        for own_first in (True, False):
            context.clear()
            sequences = [_patterns(sequence, own_first) for sequence in scratch]
            errors[own_first] = _distance(context.decode(tokens, range(count), sequences, every), alone)
        context.clear()
        pair = context.decode(tokens[:2], range(2), [home] * 2, [True] * 2)
        context.clear()
        second = context.decode(tokens[:2], range(2), [home] * 2, [False, True])
        right, wrong = sorted(errors.values())
        seen = _distance(pair[:1], alone[:1])
        if not (right <= _CLEAR * wrong and right <= _CLEAR * seen and _distance(second, pair[1:]) <= _CLEAR * seen):
            raise ValueError(
                f"this build of llama.cpp computes passes in a way that is not known here (errors {errors}, sees "
                f"{seen:g}): use {llama_cpp.PACKAGE} {llama_cpp.RELEASE}, on a machine that it was built for"
            )
        return min(errors, key=errors.__getitem__)


@dataclass(frozen=True)
class _Document:
    """A document of a text, block by block; head_rows: which row of the head each place is, −1 where none.

    clean: empty where no block sees another one.
    """

    position: int
    noisy: list[NDArray[np.int64]]
    clean: list[NDArray[np.int64]]
    head_rows: list[NDArray[np.int64]]


def _documents(inputs: ModelInputs) -> Iterator[_Document]:
    """Yield the documents of which a row of the head is wanted, up to the last such block."""
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


def _patterns(sequence: int, own_first: bool) -> list[int]:
    """Return the scratch sequences of a clean block, so that `sequence` decides what it sees."""
    others = list(range(sequence + 1, CHUNK))
    return [sequence, *others] if own_first else [*others, sequence]


def _distance(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    # Of most rows: rounding sends one to another expert now and then, which changes that row by much.
    return float(np.median(np.abs(found - expected).mean(-1)))
