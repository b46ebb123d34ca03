"""From drafts to what a client gets: pieces of text as their blocks settle, in OpenAI's objects."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bd3_scale.data.tokenizer import INCOMPLETE, Tokenizer
from bd3_scale.generate.draft import Draft, Likelihood
from bd3_scale.generate.writer import Writer
from bd3_scale.serve.engine import Text
from bd3_scale.serve.meters import Meters

# What ends a text -> OpenAI's word for it.
_REASONS = {"length": "length", "gap": "length"}


@dataclass(frozen=True)
class Piece:
    """State what a settled block adds to a choice; `likelihoods`: of its tokens, where they were asked for.

    stopped_by, tokens, passes: of the whole text, at its end.
    """

    choice: int
    text: str
    likelihoods: list[tuple[int, Likelihood]]
    stopped_by: str | None = None
    tokens: int = 0
    passes: int = 0


@dataclass(frozen=True)
class Look:
    """State how a text stands after a pass: pieces of it, and numbers of masks between them; as `Piece` at its end."""

    choice: int
    parts: list[str | int]
    passes: int
    tokens: int
    stopped_by: str | None


@dataclass(frozen=True)
class Failure:
    """State why there will be no text."""

    message: str


Event = Piece | Look | Failure
# When a text is told of: a `Piece` of all of it at its end, one for each block, or a `Look` after each pass.
Tells = Literal["end", "blocks", "passes"]


@dataclass
class Listener:
    """Makes events of what the engine tells of one text, in the engine's thread.

    gap: of a text with a suffix, how many tokens the client gets, behind the prompt.
    """

    writer: Writer
    text: Text
    choice: int
    send: Callable[[Event], None]
    meters: Meters
    given: int
    tells: Tells
    gap: int | None = None
    _began: float = field(default_factory=time.monotonic)
    _shown: str = ""
    _told: int = 0
    _begun: bool = False

    def __call__(self, news: Draft | str) -> None:
        if isinstance(news, str):
            self.send(Failure(news))
            return
        if self.tells == "passes":
            self.send(self._look(news))
        elif news.finished and len(news.whole) > self.given:
            if not self._begun:
                self._begun = True
                self.meters.first_block.observe(time.monotonic() - self._began)
            if self.tells == "blocks" or news.sample is not None:
                self._piece(news)

    def _piece(self, draft: Draft) -> None:
        text, count, stopped_by = self._state(draft)
        tokens = self._tokens(draft)[:count]
        likelihoods = [
            (token, draft.likelihoods[self.given + place])
            for place, token in enumerate(tokens)
            if place >= self._told and self.given + place in draft.likelihoods
        ]
        piece = Piece(self.choice, text[len(self._shown) :], likelihoods, stopped_by, count, draft.nfe)
        self._shown, self._told = text, count
        if stopped_by is not None:
            self.meters.whole.observe(time.monotonic() - self._began)
        self.send(piece)

    def _tokens(self, draft: Draft) -> list[int]:
        """Return what there is behind the prompt, in the gap where there is one."""
        end = None if self.gap is None else self.given + self.gap
        return draft.whole[self.given : end]

    def _state(self, draft: Draft) -> tuple[str, int, str | None]:
        """Return the text that is sure, of how many tokens it is, and what ended it."""
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

    def _look(self, draft: Draft) -> Look:
        tokenizer, mask_id = self.writer.tokenizer, self.writer.model.vocabulary.mask_id
        if draft.sample is not None:
            text, count, stopped_by = self._state(draft)
            return Look(self.choice, [text], draft.nfe, count, stopped_by)
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
        return Look(self.choice, parts, draft.nfe, len(self._tokens(draft)), None)


@dataclass(frozen=True)
class Answer:
    """Hold what all objects of an answer have. kind: of the endpoint; prompt_tokens: over all prompts."""

    kind: Literal["completion", "chat"]
    identity: str
    model: str
    created: int
    seed: int
    prompt_tokens: int
    tokenizer: Tokenizer
    has_likelihoods: bool

    def whole(self, pieces: Mapping[int, Piece]) -> dict[str, Any]:
        """Return the answer of the texts at their end, by choice."""
        choices = []
        for index, piece in sorted(pieces.items()):
            message = {"role": "assistant", "content": piece.text}
            said = {"text": piece.text} if self.kind == "completion" else {"message": message}
            choices.append(self._choice(index, said, piece.likelihoods, piece.stopped_by))
        name = "text_completion" if self.kind == "completion" else "chat.completion"
        return {**self._head(name), "choices": choices, "usage": self.usage(list(pieces.values()))}

    def chunk(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        """Return what a stream tells of a piece; first: of its choice."""
        if self.kind == "completion":
            said: dict[str, Any] = {"text": piece.text}
            name = "text_completion"
        else:
            role = {"role": "assistant"} if first else {}
            said, name = {"delta": {**role, "content": piece.text}}, "chat.completion.chunk"
        choice = self._choice(piece.choice, said, piece.likelihoods, piece.stopped_by)
        return {**self._head(name), "choices": [choice]}

    def last_chunk(self, ends: Sequence[Piece]) -> dict[str, Any]:
        """Return the chunk that tells of usage alone."""
        name = "text_completion" if self.kind == "completion" else "chat.completion.chunk"
        return {**self._head(name), "choices": [], "usage": self.usage(ends)}

    def usage(self, ends: Sequence[Piece]) -> dict[str, int]:
        """Return the tokens, and over how many passes they were unmasked."""
        written = sum(piece.tokens for piece in ends)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
            "denoising_passes": sum(piece.passes for piece in ends),
        }

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self.identity, "object": name, "created": self.created, "model": self.model, "seed": self.seed}

    def _choice(
        self, index: int, said: dict[str, Any], likelihoods: list[tuple[int, Likelihood]], stopped_by: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.has_likelihoods:
            logprobs = self._legacy(likelihoods) if self.kind == "completion" else self._content(likelihoods)
        reason = None if stopped_by is None else _REASONS.get(stopped_by, "stop")
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason, "stopped_by": stopped_by}

    def _legacy(self, likelihoods: list[tuple[int, Likelihood]]) -> dict[str, Any]:
        names = self._name
        return {
            "tokens": [names(token) for token, _ in likelihoods],
            "token_logprobs": [each.log_probability for _, each in likelihoods],
            "top_logprobs": [{names(i): value for i, value in each.most_likely} for _, each in likelihoods],
        }

    def _content(self, likelihoods: list[tuple[int, Likelihood]]) -> dict[str, Any]:
        def entry(token: int, value: float) -> dict[str, Any]:
            name = self._name(token)
            # Where it is but a part of a character, its bytes cannot be told from its text.
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
