"""Describe a text that grows block by block: its request, its state, and its end.

Blocks are aligned to position 0, including the prompt. The tail of a prompt that fills no whole block becomes clean
tokens of the first generated block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bd3_scale.generate.config import SamplingConfig
from bd3_scale.recipe.vocabulary import Vocabulary

# A text whose last 256 tokens have an entropy below 4 nats has degenerated (Arriola et al., ICLR 2025).
ENTROPY_WINDOW = 256
SUBWORD_ENTROPY = 4.0
# Vocabularies below it are of bytes or characters, whose text never reaches 4 nats.
SMALLEST_SUBWORD_VOCABULARY = 1024
ORDER, TOKENS, CHANCE = range(3)  # purposes of random numbers, the last word of the counter
_STEPS = 16  # steps of a block whose uniforms come from one counter

# Called with the generated tokens after each block; returns how many of them to keep if the text ends there, else None.
Ends = Callable[[list[int]], int | None]


def _never(tokens: list[int]) -> int | None:
    return None


@dataclass(frozen=True)
class Request:
    """Request of one text.

    prompt: ids; masks in it are gaps, which are filled in place, block by block; tokens in later blocks than a gap are
    not seen when it is filled. seed: of this text; `sampling.seed` is ignored. window: number of tokens that a block
    sees, including itself, a multiple of the block size; None: all. eos_ids: each of them ends the text. alternatives:
    number of most likely tokens that `Draft.likelihoods` keeps for each generated token; None: no likelihoods.
    """

    prompt: Sequence[int]
    sampling: SamplingConfig
    seed: int
    eos_ids: Sequence[int]
    window: int | None = None
    ends: Ends = _never
    alternatives: int | None = None

    def check(self, vocabulary: Vocabulary, block_size: int) -> None:
        """Raise ValueError for ids outside the vocabulary, nothing to generate, or a window of less than two blocks or
        of incomplete ones.
        """
        if bad := [i for i in self.prompt if not 0 <= i < vocabulary.size]:
            raise ValueError(f"a prompt holds ids {bad[:5]} that are not in this vocabulary of {vocabulary.size}")
        most, window = self.sampling.max_new_tokens, self.window
        if most == 0 and vocabulary.mask_id not in self.prompt:
            raise ValueError(f"max_new_tokens is {most}: give at least 1, or a prompt with gaps and 0")
        if window is not None and (window % block_size or window < 2 * block_size):
            raise ValueError(f"window is {window}: give a multiple of the block size {block_size}, twice that or more")

    def capacity(self, block_size: int) -> int:
        """Return the most tokens of the text that the cache must hold."""
        longest = -(-(len(self.prompt) + self.sampling.max_new_tokens) // block_size) * block_size
        return min(longest, self.window or longest)


@dataclass(frozen=True)
class Sample:
    """A finished text. tokens: generated ids, without the prompt and without EOS; prompt: with its gaps filled; nfe:
    denoising passes; cache_passes: passes that only write the cache.
    """

    tokens: list[int]
    prompt: list[int]
    stopped_by: str
    nfe: int
    cache_passes: int


@dataclass(frozen=True)
class Likelihood:
    """The log probability of a generated token in the pass that drew it, at temperature 1, without truncation, in nats.

    most_likely: ids and log probabilities, the most likely first.
    """

    log_probability: float
    most_likely: list[tuple[int, float]]


@dataclass
class Draft:
    """A text that is being generated.

    index: the caller's number of the text. tokens: those of finished blocks, and of the prompt's whole blocks before
    its first gap; unread: number of the latter that are not in the cache yet. block: [L'], the current block, with
    masks;
    finished: whether it has no mask left; order: [L'], uniforms of its positions. sample: set when the text has ended.
    likelihoods: those of generated tokens, by position in the whole text.
    """

    index: int
    request: Request
    tokens: list[int]
    unread: int = 0
    step: int = 0
    nfe: int = 0
    cache_passes: int = 0
    block: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    finished: bool = False
    sample: Sample | None = None
    order: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    likelihoods: dict[int, Likelihood] = field(default_factory=dict)
    _drawn: dict[int, tuple[tuple[int, ...], NDArray[np.float64]]] = field(default_factory=dict)

    @classmethod
    def of(cls, index: int, request: Request, size: int, mask_id: int) -> Draft:
        """Return the draft of a request, in blocks of `size`."""
        prompt = list(request.prompt)
        clean = prompt.index(mask_id) if mask_id in prompt else len(prompt)
        tokens = prompt[: clean // size * size]
        return cls(index, request, tokens, min(len(tokens), (request.window or len(prompt) + size) - size))

    @property
    def prompt(self) -> Sequence[int]:
        """Return the ids of the prompt."""
        return self.request.prompt

    @property
    def whole(self) -> list[int]:
        """Return all tokens, including masks."""
        return self.tokens + self.block.tolist()

    @property
    def generated(self) -> int:
        """Return the number of tokens behind the prompt, of finished blocks or of the sample."""
        return max(0, len(self.tokens) - len(self.prompt)) if self.sample is None else len(self.sample.tokens)

    def uniforms(self, purpose: int, count: int) -> NDArray[np.float64]:
        """Return uniforms float64 [count] in [0, 1) of this block and step.

        They come from a counter-based generator (Philox, Salmon et al., SC 2011), so they depend on the seed, the
        position and the step alone, not on other texts of the batch. To create a generator takes longer than to draw
        for 16 steps, so numbers are drawn for 16 steps at once.
        """
        counter = (0, self.step // _STEPS, len(self.tokens), purpose)
        if purpose not in self._drawn or self._drawn[purpose][0] != counter:
            key = np.array([self.request.seed, 0], dtype=np.uint64)
            bits = np.random.Philox(key=key, counter=np.array(counter, dtype=np.uint64)).random_raw(_STEPS * count)
            # The upper 53 bits, as many as a float64 can hold.
            self._drawn[purpose] = counter, ((bits >> np.uint64(11)) * 2.0**-53).reshape(_STEPS, count)
        return self._drawn[purpose][1][self.step % _STEPS]

    def open_block(self, size: int, vocabulary: Vocabulary) -> None:
        """Begin the next block: tokens that the prompt has in it, and masks."""
        given = list(self.prompt[len(self.tokens) : len(self.tokens) + size])
        self.block = np.array(given + [vocabulary.mask_id] * (size - len(given)), dtype=np.int64)
        self.step = 0
        self.order = self.uniforms(ORDER, size)
        self.check_finished(vocabulary)

    def check_finished(self, vocabulary: Vocabulary) -> None:
        """Update whether the block is finished, and whether the text has ended with it."""
        self.finished = not (self.block == vocabulary.mask_id).any()
        if self.finished:
            self.sample = self._ended(vocabulary)

    def _ended(self, vocabulary: Vocabulary) -> Sample | None:
        """Return the sample if the finished block ends the text, else None."""
        everything, given = self.whole, len(self.prompt)
        if len(everything) < given:
            return None
        limit = self.request.sampling.max_new_tokens
        generated = everything[given : given + limit]

        def sample(count: int, stopped_by: str) -> Sample:
            return Sample(generated[:count], everything[:given], stopped_by, self.nfe, self.cache_passes)

        eos_ids = self.request.eos_ids
        if (first := next((index for index, token in enumerate(generated) if token in eos_ids), None)) is not None:
            return sample(first, "eos")
        if (count := self.request.ends(generated)) is not None:
            return sample(count, "stop string")
        if entropy(generated) < least_entropy(self.request.sampling, vocabulary):
            # The last 256 tokens are the degenerate ones. There are as many: with fewer the entropy is infinite.
            return sample(len(generated) - ENTROPY_WINDOW, "entropy")
        return sample(limit, "length") if len(everything) >= given + limit else None


def least_entropy(sampling: SamplingConfig, vocabulary: Vocabulary) -> float:
    """Return the entropy in nats below which a text ends, if no held-out text is known; 0 for small vocabularies."""
    if sampling.min_entropy is not None:
        return sampling.min_entropy
    return SUBWORD_ENTROPY if vocabulary.size >= SMALLEST_SUBWORD_VOCABULARY else 0.0


def entropy(tokens: list[int]) -> float:
    """Return the entropy in nats of the last 256 tokens' frequencies; infinite if there are fewer tokens."""
    if len(tokens) < ENTROPY_WINDOW:
        return float("inf")
    share = np.unique(tokens[-ENTROPY_WINDOW:], return_counts=True)[1] / ENTROPY_WINDOW
    return float(-(share * np.log(share)).sum())
