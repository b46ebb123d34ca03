"""Validate request bodies: those of OpenAI's completions and chat completions, and options of this server.

An option of OpenAI's that is not supported here is refused by its name, unless its value means "off".
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from bd3_scale.generate.config import SamplingConfig

MOST_STOPS, MOST_TEXTS, MOST_ALTERNATIVES = 16, 128, 20
MOST_STEPS = 10_000  # per block: ancestral unmasking loops over idle steps while all other texts wait
# Unsupported options of OpenAI's API -> values that mean "off", besides null.
_OFF_VALUES: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
# Options about the client and not about the text; they are ignored.
_IGNORED = ("metadata", "prompt_cache_key", "safety_identifier", "user")


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Body(BaseModel):
    """The options that all bodies have. `seed` is that of the first text; text i has seed + i."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Field(ge=1, le=MOST_TEXTS)] = None
    unmasking: str | None = None
    steps: Annotated[int | None, Field(ge=1, le=MOST_STEPS)] = None
    threshold: Annotated[float | None, Field(allow_inf_nan=False)] = None
    block_size: Annotated[int | None, Field(ge=1)] = None

    @model_validator(mode="before")
    @classmethod
    def _drop_off_values(cls, values: Any) -> Any:
        """Drop unsupported options that are off; refuse others, and text that cannot be encoded."""
        if not isinstance(values, dict):
            return values
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a string holds half a character (a lone surrogate): send complete characters") from error
        except RecursionError as error:
            raise ValueError("the body is nested too deeply") from error
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in _OFF_VALUES and value is not None and value not in _OFF_VALUES[name]:
                raise ValueError(f"{name} is not supported here: leave it out")
            elif name not in _OFF_VALUES and name not in _IGNORED:
                raise ValueError(f"{name} is unknown here: leave it out")
        return kept

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        words = [stop] if isinstance(stop, str) else stop or []
        if len(words) > MOST_STOPS or any(not word or len(word) > 1000 for word in words):
            raise ValueError(f"give up to {MOST_STOPS} strings of 1 to 1000 characters")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the strings that end a text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """Return the number of texts per prompt."""
        return self.n or 1

    @property
    def first_seed(self) -> int:
        """Return the requested seed, or a random one."""
        return secrets.randbits(31) if self.seed is None else self.seed

    def sampling(self, defaults: SamplingConfig, max_new_tokens: int) -> SamplingConfig:
        """Return the sampling options: the body's, and the server's defaults for those that it leaves out.

        If the body names another rule than the default one, the default rule's options do not apply.
        ValueError: an invalid value.
        """
        rule = self.unmasking or defaults.unmasking
        has_default_rule = rule == defaults.unmasking
        default_threshold = defaults.threshold if has_default_rule else None
        return SamplingConfig(
            max_new_tokens=max_new_tokens,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_k=self.top_k or defaults.top_k,
            top_p=self.top_p or defaults.top_p,
            min_entropy=defaults.min_entropy,
            unmasking=rule,
            steps=self.steps or (defaults.steps if has_default_rule else None),
            threshold=default_threshold if self.threshold is None else self.threshold,
        )


class CompletionBody(Body):
    """A body of `/v1/completions`. Prompts are text, or ids of tokens."""

    DEFAULT_TOKENS: ClassVar[int] = 16

    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_ALTERNATIVES)] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts as a list: the field may hold one text, several, or ids of one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(part, int) for part in self.prompt):
            return [[int(part) for part in self.prompt if isinstance(part, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]

    @property
    def alternatives(self) -> int | None:
        """Return how many alternatives per token are requested; None: no log probabilities."""
        return self.logprobs


class TextPart(BaseModel):
    """A text part of a message's content."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation; the chat template decides which roles there are."""

    model_config = ConfigDict(extra="forbid")
    role: str
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return the message as chat templates expect it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


class ChatBody(Body):
    """A body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_ALTERNATIVES)] = None

    @model_validator(mode="after")
    def _agrees(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: send logprobs=true, too")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self

    @property
    def alternatives(self) -> int | None:
        """Return how many alternatives per token are requested; None: no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None
