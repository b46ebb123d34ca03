"""A text that grows block by block: what is asked for, what there is of it, and when it ends.

Blocks are aligned to position 0 including the prompt, whose tail is clean tokens of the first generated block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bd3_scale.generate.config import SamplingConfig
from bd3_scale.recipe.vocabulary import Vocabulary

ENTROPY_WINDOW = 256
SUBWORD_ENTROPY = 4.0
SMALLEST_SUBWORD_VOCABULARY = 1024
ORDER, TOKENS, CHANCE = range(3)  # last words of the random counters
_STEPS = 16  # of a block whose uniforms one counter serves

# Told the generated tokens after each block: how many of them to keep where the text ends there, else None.
Ends = Callable[[list[int]], int | None]


def _never(tokens: list[int]) -> int | None:
    return None


@dataclass(frozen=True)
class Request:
    """State which text is to be written.

    prompt: ids; masks in it are gaps, which are filled in place, block by block; what follows a gap in later blocks is
    not seen. seed: of this text; that of `sampling` is not looked at. window: how many tokens a block sees, itself
    among them, whole blocks; None: all. eos_ids: each of them ends the text. alternatives: how many of the most likely
    tokens `Draft.likelihoods` has beside each that was taken; None: it has none.
    """

    prompt: Sequence[int]
    sampling: SamplingConfig
    seed: int
    eos_ids: Sequence[int]
    window: int | None = None
    ends: Ends = _never
    alternatives: int | None = None

    def check(self, vocabulary: Vocabulary, block_size: int) -> None:
        """Raise ValueError for ids outside the vocabulary, no new tokens without a gap to fill, or a window that is not
        of whole blocks or holds fewer than two.
        """
        if bad := [i for i in self.prompt if not 0 <= i < vocabulary.size]:
            raise ValueError(f"a prompt holds ids {bad[:5]} that are not in this vocabulary of {vocabulary.size}")
        most, window = self.sampling.max_new_tokens, self.window
        if most == 0 and vocabulary.mask_id not in self.prompt:
            raise ValueError(f"max_new_tokens is {most}: give at least 1, or a prompt with gaps and 0")
        if window is not None and (window % block_size or window < 2 * block_size):
            raise ValueError(f"window is {window}: give a multiple of the block size {block_size}, twice that or more")

    def capacity(self, block_size: int) -> int:
        """Return how many tokens of the text the cache holds at the most."""
        longest = -(-(len(self.prompt) + self.sampling.max_new_tokens) // block_size) * block_size
        return min(longest, self.window or longest)


@dataclass(frozen=True)
class Sample:
    """`tokens`: generated ids, without the prompt and without EOS; `prompt`: with its gaps filled; `nfe`: denoising
    passes; `cache_passes`: apart from them.
    """

    tokens: list[int]
    prompt: list[int]
    stopped_by: str
    nfe: int
    cache_passes: int


@dataclass(frozen=True)
class Likelihood:
    """State what the model thought of a token in the pass that took it: nats, at temperature 1, without truncation.

    most_likely: ids and their log probabilities, the most likely first.
    """

    log_probability: float
    most_likely: list[tuple[int, float]]


@dataclass
class Draft:
    """A text that grows.

    index: a number that the caller knows it by. tokens: of its finished blocks, and of the prompt's whole blocks
    before its first gap; unread: how many of the latter are not in the cache yet; block: [L'], with masks; finished:
    whether it has none any more; order: [L'], its places' uniforms; sample: where the text has ended; likelihoods: by
    place in the whole text, of what was generated.
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
        """Return the beginning of a text in blocks of `size`."""
        prompt = list(request.prompt)
        clean = prompt.index(mask_id) if mask_id in prompt else len(prompt)
        tokens = prompt[: clean // size * size]
        return cls(index, request, tokens, min(len(tokens), (request.window or len(prompt) + size) - size))

    @property
    def prompt(self) -> Sequence[int]:
        return self.request.prompt

    @property
    def whole(self) -> list[int]:
        """All tokens, masks among them."""
        return self.tokens + self.block.tolist()

    @property
    def generated(self) -> int:
        """How many tokens of finished blocks, or of the sample, are behind the prompt."""
        return max(0, len(self.tokens) - len(self.prompt)) if self.sample is None else len(self.sample.tokens)

    def uniforms(self, purpose: int, count: int) -> NDArray[np.float64]:
        """float64 [count] in [0, 1) of this block and step; a generator is made for 16 steps at once, since that takes
        longer than they do.
        """
        counter = (0, self.step // _STEPS, len(self.tokens), purpose)
        if purpose not in self._drawn or self._drawn[purpose][0] != counter:
            key = np.array([self.request.seed, 0], dtype=np.uint64)
            bits = np.random.Philox(key=key, counter=np.array(counter, dtype=np.uint64)).random_raw(_STEPS * count)
            self._drawn[purpose] = counter, ((bits >> np.uint64(11)) * 2.0**-53).reshape(_STEPS, count)
        return self._drawn[purpose][1][self.step % _STEPS]

    def open_block(self, size: int, vocabulary: Vocabulary) -> None:
        """Begin the next block: what the prompt has of it, else masks."""
        given = list(self.prompt[len(self.tokens) : len(self.tokens) + size])
        self.block = np.array(given + [vocabulary.mask_id] * (size - len(given)), dtype=np.int64)
        self.step = 0
        self.order = self.uniforms(ORDER, size)
        self.settle(vocabulary)

    def settle(self, vocabulary: Vocabulary) -> None:
        """Look whether the block is finished, and the text with it."""
        self.finished = not (self.block == vocabulary.mask_id).any()
        if self.finished:
            self.sample = self._ended(vocabulary)

    def _ended(self, vocabulary: Vocabulary) -> Sample | None:
        """Return the sample, if the finished block ends it."""
        everything, given = self.whole, len(self.prompt)
        if len(everything) < given:
            return None
        limit = self.request.sampling.max_new_tokens
        generated = everything[given : given + limit]

        def sample(count: int, stopped_by: str) -> Sample:
            return Sample(generated[:count], everything[:given], stopped_by, self.nfe, self.cache_passes)

        eos_ids = self.request.eos_ids
        if (first := next((place for place, token in enumerate(generated) if token in eos_ids), None)) is not None:
            return sample(first, "eos")
        if (count := self.request.ends(generated)) is not None:
            return sample(count, "stop string")
        if entropy(generated) < least_entropy(self.request.sampling, vocabulary):
            # They are what was found degenerate; the entropy is infinite where there are fewer.
            return sample(len(generated) - ENTROPY_WINDOW, "entropy")
        return sample(limit, "length") if len(everything) >= given + limit else None


def least_entropy(sampling: SamplingConfig, vocabulary: Vocabulary) -> float:
    """Return the nats below which a text ends where nobody knows text of this vocabulary; 0 where it has few ids."""
    if sampling.min_entropy is not None:
        return sampling.min_entropy
    return SUBWORD_ENTROPY if vocabulary.size >= SMALLEST_SUBWORD_VOCABULARY else 0.0


def entropy(tokens: list[int]) -> float:
    """Return the nats of the frequencies of the last 256 tokens; infinite before there are as many."""
    if len(tokens) < ENTROPY_WINDOW:
        return float("inf")
    share = np.unique(tokens[-ENTROPY_WINDOW:], return_counts=True)[1] / ENTROPY_WINDOW
    return float(-(share * np.log(share)).sum())
