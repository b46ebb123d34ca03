"""Generate text with a loaded model: prompts and stop strings as text, whole texts and streams of their blocks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bd3_scale.data.chat import ChatTemplate, Messages, chat_template
from bd3_scale.data.tokenizer import INCOMPLETE, MASK, Tokenizer
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.draft import Draft, Request
from bd3_scale.generate.sampler import denoise
from bd3_scale.model.transformer import BlockDiffusionTransformer


@dataclass(frozen=True)
class Written:
    """A generated text. text: what was generated; with gaps the whole text. tokens: generated ids. seconds: of its
    batch.

    window: tokens that a block sees, including itself, if the text is longer than the training's sequences; else None.
    """

    prompt: str
    text: str
    tokens: list[int]
    stopped_by: str
    nfe: int
    cache_passes: int
    min_entropy: float
    window: int | None
    seconds: float


@dataclass(frozen=True)
class Piece:
    """The text that a finished block adds to text `index`; stopped_by: why the text ends with it, None if it goes
    on."""

    index: int
    text: str
    stopped_by: str | None


@dataclass(frozen=True)
class _Batch:
    """Texts that are sampled together: the index of the first, their prompts, and their passes."""

    first: int
    prompts: Sequence[str]
    passes: Iterator[list[Draft]]


@dataclass(frozen=True)
class Writer:
    """Generates text with a loaded model, any number of times.

    context: tokens of the training's sequences. eos_ids: each of them ends a text. least_entropy: returns the nats to
    use if `sampling.min_entropy` is None. chat_template: the folder that may hold one.
    """

    model: BlockDiffusionTransformer
    tokenizer: Tokenizer
    block_size: int
    context: int
    eos_ids: Sequence[int]
    least_entropy: Callable[[], float]
    chat_template: Path

    def write(
        self,
        prompts: Sequence[str | Messages],
        sampling: SamplingConfig,
        *,
        infill: bool = False,
        stop: Sequence[str] = (),
        batch_size: int = 16,
        progress: Callable[[int, int], object] = lambda done, limit: None,
        watch: Callable[[int, str], object] | None = None,
    ) -> Iterator[Written]:
        """Continue every prompt; text i depends on `sampling.seed` + i and its prompt alone.

        Args:
            prompts: texts, or conversations, which the chat template turns into text.
            infill: each `[MASK]` of a prompt is a gap of one token.
            stop: strings that end a text; the text does not contain them.
            progress: called after each pass with the tokens generated so far and their limit, over all texts.
            watch: called after each pass with a text's index and its current text.

        Raises:
            ValueError: a conversation without a chat template, or what `denoise` refuses.
        """
        limit = sampling.max_new_tokens
        for batch in self._batches(prompts, sampling, infill, stop, batch_size):
            began = time.monotonic()
            drafts: dict[int, Draft] = {}
            for active in batch.passes:
                drafts |= {draft.index: draft for draft in active}
                done = batch.first * limit + sum(draft.generated for draft in drafts.values())
                progress(done, limit * len(prompts))
                if watch is not None:
                    for draft in active:
                        watch(
                            batch.first + draft.index, without_partial_characters(self.tokenizer.text_of(draft.whole))
                        )
            seconds = time.monotonic() - began
            for index, prompt in enumerate(batch.prompts):
                yield self._written(prompt, drafts[index], stop, infill, seconds)

    def stream(
        self,
        prompts: Sequence[str | Messages],
        sampling: SamplingConfig,
        *,
        infill: bool = False,
        stop: Sequence[str] = (),
        batch_size: int = 16,
    ) -> Iterator[Piece]:
        """Yield the texts of `write` block by block: the pieces of a text, joined, make the text.

        There are two exceptions. A text that ends by low entropy has already been streamed with the tokens that are
        dropped then, and bytes that are no valid UTF-8 may be shown differently. Incomplete characters and a possible
        beginning of a stop string are held back until they are complete.
        """
        for batch in self._batches(prompts, sampling, infill, stop, batch_size):
            shown = [0] * len(batch.prompts)
            for active in batch.passes:
                for draft in active:
                    if not draft.finished:
                        continue
                    text = self.text_of(draft, stop, infill=infill)
                    ended = None if draft.sample is None else draft.sample.stopped_by
                    yield Piece(batch.first + draft.index, text[shown[draft.index] :], ended)
                    shown[draft.index] = len(text)

    def request(
        self,
        prompt: Sequence[int],
        sampling: SamplingConfig,
        *,
        seed: int,
        stop: Sequence[str] = (),
        window: int | None = None,
        alternatives: int | None = None,
    ) -> Request:
        """Return the `Request` of a text, with this model's ids that end it."""

        def ends(tokens: list[int]) -> int | None:
            return kept_tokens(self.tokenizer, prompt, tokens, stop)

        if sampling.min_entropy is None:
            sampling = replace(sampling, min_entropy=self.least_entropy())
        return Request(prompt, sampling, seed, self.eos_ids, window, ends, alternatives)

    @property
    def has_chat(self) -> bool:
        """Return whether there is a chat template."""
        return chat_template(self.chat_template) is not None

    def window(self, length: int) -> int | None:
        """Return how many tokens a block of a text of `length` tokens sees, None if it sees all of them."""
        return self.context if length > self.context and self.context >= 2 * self.block_size else None

    def _batches(
        self, prompts: Sequence[str | Messages], sampling: SamplingConfig, infill: bool, stop: Sequence[str], size: int
    ) -> Iterator[_Batch]:
        sampling = replace(
            sampling, min_entropy=self.least_entropy() if sampling.min_entropy is None else sampling.min_entropy
        )
        encoded = self.encoded(prompts, infill=infill)
        for first in range(0, len(encoded), size):
            texts, ids = zip(*encoded[first : first + size], strict=True)
            window = self.window(max(map(len, ids)) + sampling.max_new_tokens)
            requests = [
                self.request(each, sampling, seed=sampling.seed + first + index, stop=stop, window=window)
                for index, each in enumerate(ids)
            ]
            yield _Batch(first, texts, denoise(self.model, requests, block_size=self.block_size))

    def encoded(self, prompts: Sequence[str | Messages], *, infill: bool = False) -> list[tuple[str, list[int]]]:
        """Return the text and the ids of every prompt. BOS of a conversation comes from the chat template alone."""
        template = None if all(isinstance(prompt, str) for prompt in prompts) else ChatTemplate(self.chat_template)
        pairs = []
        for prompt in prompts:
            if isinstance(prompt, str):
                pairs.append((prompt, encode_prompt(self.tokenizer, prompt, infill)))
            else:
                assert template is not None
                text = template.prompt(prompt)
                pairs.append((text, self.tokenizer.encode_special(text)))
        return pairs

    def _written(self, prompt: str, draft: Draft, stop: Sequence[str], infill: bool, seconds: float) -> Written:
        sample, request = draft.sample, draft.request
        assert sample is not None
        assert request.sampling.min_entropy is not None
        text = self.text_of(draft, stop, infill=infill)
        counts = (sample.stopped_by, sample.nfe, sample.cache_passes)
        return Written(prompt, text, sample.tokens, *counts, request.sampling.min_entropy, request.window, seconds)

    def text_of(self, draft: Draft, stop: Sequence[str] = (), *, infill: bool = False) -> str:
        """Return the part of a text that cannot change any more, at the end of a block; with gaps the whole text so
        far."""
        everything, given = draft.whole, len(draft.prompt)
        if draft.sample is not None:
            prompt = draft.sample.prompt
            text = text_before(self.tokenizer.continuation(prompt, draft.sample.tokens), stop)
        elif len(everything) < given:
            return self.tokenizer.continuation([], everything, final=False)
        else:
            prompt = everything[:given]
            text = without_start_of(stop, self.tokenizer.continuation(prompt, everything[given:], final=False))
        return self.tokenizer.text_of(prompt) + text if infill else text


def encode_prompt(tokenizer: Tokenizer, prompt: str, infill: bool) -> list[int]:
    """Return the ids of a prompt; without `infill` a `[MASK]` in it is ordinary text."""
    if infill and MASK not in prompt:
        raise ValueError(f"--infill fills the {MASK} of a prompt, but {prompt[:60]!r} has none")
    return tokenizer.encode_prompt(prompt, gaps=infill)


def kept_tokens(tokenizer: Tokenizer, prompt: Sequence[int], tokens: list[int], stop: Sequence[str]) -> int | None:
    """Return the fewest tokens behind a prompt whose text contains one of the strings; None if no string occurs."""

    def holds(count: int) -> bool:
        text = tokenizer.continuation(prompt, tokens[:count])
        return any(word in text for word in stop)

    if not stop or not holds(len(tokens)):
        return None
    # Binary search: once a prefix contains a string, all longer ones do.
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


def without_partial_characters(text: str) -> str:
    """Return a text with masks without its incomplete characters, some of whose bytes are still masked or missing."""
    return re.sub(rf"{INCOMPLETE}+(?={re.escape(MASK)}|$)", "", text)


def text_before(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first occurrence of any of the strings."""
    ends = [text.index(word) for word in stop if word in text]
    return text[: min(ends)] if ends else text


def without_start_of(stop: Sequence[str], text: str) -> str:
    """Return the text without an ending that may be the beginning of one of the strings."""
    held = max((size for word in stop for size in range(1, len(word)) if text.endswith(word[:size])), default=0)
    return text[: len(text) - held]
