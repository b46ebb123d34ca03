"""Turn drafts into what a client receives: pieces of text as blocks are finished, in OpenAI's response objects."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bd3_scale.data.tokenizer import INCOMPLETE, Tokenizer
from bd3_scale.generate.draft import Draft, Likelihood
from bd3_scale.generate.writer import Writer
from bd3_scale.serve.engine import Text
from bd3_scale.serve.server_metrics import ServerMetrics

# Why a text ends -> OpenAI's `finish_reason`; all others are "stop".
_REASONS = {"length": "length", "gap": "length"}


@dataclass(frozen=True)
class Piece:
    """The text that a finished block adds to a choice; `likelihoods`: those of its tokens, if requested.

    stopped_by, tokens, passes: of the whole text, set in its last piece.
    """

    choice: int
    text: str
    likelihoods: list[tuple[int, Likelihood]]
    stopped_by: str | None = None
    tokens: int = 0
    passes: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A text after a pass: its parts are strings, and numbers of masks between them; the last one is like a `Piece`."""

    choice: int
    parts: list[str | int]
    passes: int
    tokens: int
    stopped_by: str | None


@dataclass(frozen=True)
class Failure:
    """The reason why a text cannot be generated."""

    message: str


Event = Piece | Snapshot | Failure
# What a client receives: one `Piece` at the end, one for each block, or a `Snapshot` after each pass.
Granularity = Literal["end", "blocks", "passes"]


@dataclass
class Listener:
    """Turns the drafts of one text into events, in the engine's thread.

    given: tokens of the prompt. gap: for a text with a suffix, the tokens between prompt and suffix, which are the
        answer.
    """

    writer: Writer
    text: Text
    choice: int
    send: Callable[[Event], None]
    metrics: ServerMetrics
    given: int
    granularity: Granularity
    gap: int | None = None
    _began: float = field(default_factory=time.monotonic)
    _shown: str = ""
    _sent_tokens: int = 0
    _has_text: bool = False

    def __call__(self, update: Draft | str) -> None:
        """Send what a draft adds, or a failure with its message."""
        if isinstance(update, str):
            self.send(Failure(update))
            return
        if self.granularity == "passes":
            self.send(self._snapshot(update))
        elif update.finished and len(update.whole) > self.given:
            if not self._has_text:
                self._has_text = True
                self.metrics.first_block.observe(time.monotonic() - self._began)
            if self.granularity == "blocks" or update.sample is not None:
                self._piece(update)

    def _piece(self, draft: Draft) -> None:
        text, count, stopped_by = self._state(draft)
        tokens = self._tokens(draft)[:count]
        likelihoods = [
            (token, draft.likelihoods[self.given + index])
            for index, token in enumerate(tokens)
            if index >= self._sent_tokens and self.given + index in draft.likelihoods
        ]
        piece = Piece(self.choice, text[len(self._shown) :], likelihoods, stopped_by, count, draft.nfe)
        self._shown, self._sent_tokens = text, count
        if stopped_by is not None:
            self.metrics.whole.observe(time.monotonic() - self._began)
        self.send(piece)

    def _tokens(self, draft: Draft) -> list[int]:
        """Return the tokens behind the prompt; with a suffix, those of the gap."""
        end = None if self.gap is None else self.given + self.gap
        return draft.whole[self.given : end]

    def _state(self, draft: Draft) -> tuple[str, int, str | None]:
        """Return the text that cannot change any more, its number of tokens, and why it ended."""
        if self.gap is None:
            sample = draft.sample
            text = self.writer.text_of(draft, self.text.stop)
            if sample is None:
                return text, len(self._tokens(draft)), None
            return text, len(sample.tokens), sample.stopped_by
        tokens = self._tokens(draft)
        end = next((i for i, token in enumerate(tokens) if token in self.writer.eos_ids), len(tokens))
        final = draft.sample is not None
        text = self.writer.tokenizer.continuation(draft.whole[: self.given], tokens[:end], final=final)
        return text, end, ("eos" if end < len(tokens) else "gap") if final else None

    def _snapshot(self, draft: Draft) -> Snapshot:
        tokenizer, mask_id = self.writer.tokenizer, self.writer.model.vocabulary.mask_id
        if draft.sample is not None:
            text, count, stopped_by = self._state(draft)
            return Snapshot(self.choice, [text], draft.nfe, count, stopped_by)
        parts: list[str | int] = []
        run: list[int] = []
        before = draft.whole[: self.given]
        for token in [*self._tokens(draft), None]:
            if token is not None and token != mask_id:
                run.append(token)
                continue
            if run:
                parts.append(tokenizer.continuation(before if not parts else [], run))
                run = []
            if token == mask_id:
                if parts and isinstance(parts[-1], int):
                    parts[-1] += 1
                else:
                    parts.append(1)
        return Snapshot(self.choice, parts, draft.nfe, len(self._tokens(draft)), None)


@dataclass(frozen=True)
class Answer:
    """Builds the response objects of a request. kind: of the endpoint; prompt_tokens: those of all prompts."""

    kind: Literal["completion", "chat"]
    identity: str
    model: str
    created: int
    seed: int
    prompt_tokens: int
    tokenizer: Tokenizer
    has_likelihoods: bool

    def whole(self, pieces: Mapping[int, Piece]) -> dict[str, Any]:
        """Return the response of a request without streaming, from the last piece of each choice."""
        choices = []
        for index, piece in sorted(pieces.items()):
            message = {"role": "assistant", "content": piece.text}
            content = {"text": piece.text} if self.kind == "completion" else {"message": message}
            choices.append(self._choice(index, content, piece.likelihoods, piece.stopped_by))
        name = "text_completion" if self.kind == "completion" else "chat.completion"
        return {**self._head(name), "choices": choices, "usage": self.usage(list(pieces.values()))}

    def chunk(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        """Return a stream's chunk of a piece; first: whether it is the first of its choice."""
        if self.kind == "completion":
            content: dict[str, Any] = {"text": piece.text}
            name = "text_completion"
        else:
            role = {"role": "assistant"} if first else {}
            content, name = {"delta": {**role, "content": piece.text}}, "chat.completion.chunk"
        choice = self._choice(piece.choice, content, piece.likelihoods, piece.stopped_by)
        return {**self._head(name), "choices": [choice]}

    def last_chunk(self, ends: Sequence[Piece]) -> dict[str, Any]:
        """Return a stream's last chunk, which holds only the usage."""
        name = "text_completion" if self.kind == "completion" else "chat.completion.chunk"
        return {**self._head(name), "choices": [], "usage": self.usage(ends)}

    def usage(self, ends: Sequence[Piece]) -> dict[str, int]:
        """Return the numbers of tokens, and of denoising passes over all texts."""
        completion_tokens = sum(piece.tokens for piece in ends)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "denoising_passes": sum(piece.passes for piece in ends),
        }

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self.identity, "object": name, "created": self.created, "model": self.model, "seed": self.seed}

    def _choice(
        self, index: int, content: dict[str, Any], likelihoods: list[tuple[int, Likelihood]], stopped_by: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.has_likelihoods:
            has_legacy_form = self.kind == "completion"
            logprobs = self._legacy_logprobs(likelihoods) if has_legacy_form else self._chat_logprobs(likelihoods)
        reason = None if stopped_by is None else _REASONS.get(stopped_by, "stop")
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason, "stopped_by": stopped_by}

    def _legacy_logprobs(self, likelihoods: list[tuple[int, Likelihood]]) -> dict[str, Any]:
        names = self._name
        return {
            "tokens": [names(token) for token, _ in likelihoods],
            "token_logprobs": [each.log_probability for _, each in likelihoods],
            "top_logprobs": [{names(i): value for i, value in each.most_likely} for _, each in likelihoods],
        }

    def _chat_logprobs(self, likelihoods: list[tuple[int, Likelihood]]) -> dict[str, Any]:
        def entry(token: int, value: float) -> dict[str, Any]:
            name = self._name(token)
            # A token that is only a part of a character decodes to U+FFFD, which does not say what its bytes are.
            return {"token": name, "logprob": value, "bytes": None if INCOMPLETE in name else list(name.encode())}

        content = [
            {
                **entry(token, each.log_probability),
                "top_logprobs": [entry(i, value) for i, value in each.most_likely],
            }
            for token, each in likelihoods
        ]
        return {"content": content}

    def _name(self, token: int) -> str:
        return self.tokenizer.text_of([token])
