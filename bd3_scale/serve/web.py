"""Define the HTTP endpoints over the engine: OpenAI's, health, metrics, and a page that shows a text lose its masks."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from bd3_scale.generate.config import SamplingConfig
from bd3_scale.registry import unmasking_rules
from bd3_scale.serve.answers import Answer, Failure, Piece, Snapshot
from bd3_scale.serve.bodies import MOST_TEXTS, ChatBody, CompletionBody
from bd3_scale.serve.engine import Engine, Text
from bd3_scale.serve.errors import RefusedError, validation_error
from bd3_scale.serve.gate import Gate
from bd3_scale.serve.page import page
from bd3_scale.serve.text_request import Run, TextRequest

_EVENT_STREAM = "text/event-stream"


@dataclass(frozen=True)
class Limits:
    """Limits of a request. new_tokens: of one text; seconds: from the request to the end of the answer."""

    prompt_tokens: int
    new_tokens: int
    seconds: float
    body_bytes: int


class Web:
    """The HTTP application of one engine. name: the model's name for clients."""

    def __init__(self, engine: Engine, *, name: str, defaults: SamplingConfig, limits: Limits, key: str | None) -> None:
        self.engine, self.name, self.defaults, self.limits = engine, name, defaults, limits
        self._created = int(time.time())
        self.app = FastAPI(title=f"bd3_scale: {name}", docs_url=None, redoc_url=None)
        self.app.add_middleware(Gate, key=key, most_bytes=limits.body_bytes, metrics=engine.metrics)
        self.app.add_exception_handler(RefusedError, _refused)
        self.app.add_exception_handler(RequestValidationError, _invalid)
        self.app.add_exception_handler(HTTPException, _http)
        self.app.add_exception_handler(Exception, _unforeseen)
        self.app.get("/v1/models")(self.models)
        self.app.get("/v1/models/{model:path}")(self.model)
        self.app.post("/v1/completions", response_model=None)(self.completions)
        self.app.post("/v1/chat/completions", response_model=None)(self.chat)
        self.app.post("/denoise", response_model=None)(self.denoise)
        self.app.post("/denoise/chat", response_model=None)(self.denoise_chat)
        self.app.get("/health")(self.health)
        self.app.get("/metrics")(self.metrics)
        self.app.get("/")(self.page)

    async def models(self) -> dict[str, Any]:
        """List the model that is served."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, model: str) -> dict[str, Any]:
        """Describe the model that is served."""
        self._check_model(model)
        return self._model()

    def _model(self) -> dict[str, Any]:
        writer = self.engine.writer
        about = {
            "block_size": writer.block_size,
            "context_length": writer.context,
            "has_chat": writer.has_chat,
            "unmasking": self.defaults.unmasking,
            "unmasking_rules": _rules(),
        }
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "bd3_scale", **about}

    async def health(self) -> Response:
        """Tell whether the engine runs."""
        failure = self.engine.failure
        return JSONResponse({"status": failure or "ok"}, 200 if failure is None else 503)

    async def metrics(self) -> Response:
        """Tell the counters in Prometheus' text format."""
        return Response(generate_latest(self.engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def page(self) -> HTMLResponse:
        """Return the page that shows how a text loses its masks."""
        return page()

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Continue prompts, or fill the gap between a prompt and a suffix."""
        texts = await asyncio.to_thread(self._completion, body)
        return await self._answer(texts, request, stream=bool(body.stream), usage=_wants_usage(body))

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        texts = await asyncio.to_thread(self._chat, body)
        return await self._answer(texts, request, stream=bool(body.stream), usage=_wants_usage(body))

    async def denoise(self, body: CompletionBody, request: Request) -> Response:
        """Stream a text's state after each pass."""
        return self._snapshots(await asyncio.to_thread(self._completion, body), request)

    async def denoise_chat(self, body: ChatBody, request: Request) -> Response:
        """Stream the state of the answer to a conversation after each pass."""
        return self._snapshots(await asyncio.to_thread(self._chat, body), request)

    # --- bodies to texts. Chat templates and tokenisers may take seconds: they run in a thread and not in the event
    # loop.

    def _completion(self, body: CompletionBody) -> TextRequest:
        self._check_body(body)
        writer, vocabulary = self.engine.writer, self.engine.writer.model.vocabulary
        tokens = self._check_new_tokens(body.max_tokens or body.DEFAULT_TOKENS)
        if not body.prompts:
            raise RefusedError("there is no prompt: give one, which may be empty", param="prompt")
        if (count := len(body.prompts) * body.choices) > MOST_TEXTS:
            raise RefusedError(
                f"{count:,} texts are requested, and a request may have {MOST_TEXTS}: send several requests",
                param="prompt",
            )
        prompts = [self._ids(prompt) for prompt in body.prompts]
        given, gap = [len(prompt) for prompt in prompts], None
        if body.suffix:
            if body.stop:
                raise RefusedError("stop and suffix exclude each other: leave one of them out", param="stop")
            gap = tokens
            suffix = writer.tokenizer.encode(body.suffix)
            prompts = [[*prompt, *[vocabulary.mask_id] * tokens, *suffix] for prompt in prompts]
        sampling = self._sampling(body, 0 if gap else tokens)
        return self._text_request("completion", body, prompts, given, sampling, gap)

    def _chat(self, body: ChatBody) -> TextRequest:
        self._check_body(body)
        writer = self.engine.writer
        if not writer.has_chat:
            raise RefusedError(
                f"{self.name} has no chat template, so it was not trained on conversations: use /v1/completions",
                param="messages",
            )
        try:
            ((_, ids),) = writer.encoded([[message.plain() for message in body.messages]])
        except ValueError as error:
            raise RefusedError(str(error), param="messages") from error
        room = max(writer.block_size, self.engine.capacity - len(ids))
        tokens = self._check_new_tokens(
            body.max_completion_tokens or body.max_tokens or min(room, self.limits.new_tokens)
        )
        return self._text_request("chat", body, [ids], [len(ids)], self._sampling(body, tokens), None)

    def _text_request(
        self,
        kind: Any,
        body: CompletionBody | ChatBody,
        prompts: list[list[int]],
        given: list[int],
        sampling: SamplingConfig,
        gap: int | None,
    ) -> TextRequest:
        limits = self.limits
        for prompt in prompts:
            if len(prompt) > limits.prompt_tokens:
                raise RefusedError(
                    f"a prompt has {len(prompt):,} tokens, and {limits.prompt_tokens:,} are allowed: shorten it",
                    code="context_length_exceeded",
                )
        seed = body.first_seed
        texts = [
            Text(prompt, sampling, seed + index * body.choices + choice, body.stops, body.alternatives)
            for index, prompt in enumerate(prompts)
            for choice in range(body.choices)
        ]
        writer = self.engine.writer
        if (longest := max(text.length for text in texts)) and not self.engine.holds(longest):
            raise RefusedError(
                f"prompt and answer have {longest:,} tokens together, and the cache holds {self.engine.capacity:,} "
                "(--cache-tokens): shorten one of them",
                code="context_length_exceeded",
            )
        prefix = {"completion": "cmpl", "chat": "chatcmpl"}[kind]
        answer = Answer(
            kind, f"{prefix}-{uuid.uuid4().hex}", self.name, int(time.time()), seed, sum(given), writer.tokenizer,
            body.alternatives is not None,
        )  # fmt: skip
        return TextRequest(texts, [count for count in given for _ in range(body.choices)], answer, gap)

    def _check_new_tokens(self, tokens: int) -> int:
        if tokens > self.limits.new_tokens:
            raise RefusedError(
                f"a text may have {self.limits.new_tokens:,} new tokens: request fewer", param="max_tokens"
            )
        return tokens

    def _ids(self, prompt: str | list[int]) -> list[int]:
        writer = self.engine.writer
        if isinstance(prompt, str):
            return writer.encoded([prompt])[0][1]
        size, mask_id = writer.model.vocabulary.size, writer.model.vocabulary.mask_id
        # Ids of some tokenisers have gaps: an id below the vocabulary's size may have no token.
        wrong = (i for i in prompt if not 0 <= i < size or i == mask_id or writer.tokenizer.name_of(i) is None)
        if bad := list(itertools.islice(wrong, 5)):
            raise RefusedError(f"the prompt has ids {bad} that are no tokens of {self.name}", param="prompt")
        return prompt

    def _sampling(self, body: CompletionBody | ChatBody, tokens: int) -> SamplingConfig:
        try:
            sampling = body.sampling(self.defaults, tokens)
            self.engine.check(sampling)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        return sampling

    def _check_body(self, body: CompletionBody | ChatBody) -> None:
        self._check_model(body.model)
        size = self.engine.writer.block_size
        if body.block_size not in (None, size):
            raise RefusedError(
                f"block_size is {body.block_size}, and {self.name} has blocks of {size}: leave it out",
                param="block_size",
            )
        if body.stream_options is not None and not body.stream:
            raise RefusedError("stream_options needs stream=true: send it, too", param="stream_options")

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise RefusedError(
                f"there is no model {name!r}: this server has {self.name!r}", 404, param="model",
                code="model_not_found",
            )  # fmt: skip

    # --- texts to answers

    async def _answer(self, texts: TextRequest, request: Request, *, stream: bool, usage: bool) -> Response:
        run = Run(self.engine, texts, request, self.limits.seconds, "blocks" if stream else "end")
        if stream:
            return StreamingResponse(self._streamed(run, usage), media_type=_EVENT_STREAM)
        pieces: dict[int, Piece] = {}
        async with aclosing(run.events()) as events:
            async for event in events:
                if isinstance(event, Failure):
                    raise RefusedError(event.message, 500)
                assert isinstance(event, Piece)
                pieces[event.choice] = event
        if run.client_left:
            return Response(status_code=499)  # nginx's code for "client closed request"; it is only counted
        return JSONResponse(texts.answer.whole(pieces))

    def _snapshots(self, texts: TextRequest, request: Request) -> Response:
        if len(texts.texts) > 1:
            raise RefusedError(f"this endpoint streams one text, not {len(texts.texts)}: request one")
        run = Run(self.engine, texts, request, self.limits.seconds, "passes")

        async def snapshots() -> AsyncIterator[str]:
            began = time.monotonic()
            try:
                async with aclosing(run.events()) as events:
                    async for event in events:
                        if isinstance(event, Failure):
                            yield _data(RefusedError(event.message, 500).body)
                        elif isinstance(event, Snapshot):
                            yield _data({**vars(event), "seconds": round(time.monotonic() - began, 4)})
            except RefusedError as refusal:
                yield _data(refusal.body)

        return StreamingResponse(snapshots(), media_type=_EVENT_STREAM)

    async def _streamed(self, run: Run, usage: bool) -> AsyncIterator[str]:
        answer, begun, ends = run.texts.answer, set(), []
        try:
            async with aclosing(run.events()) as events:
                async for event in events:
                    if isinstance(event, Failure):
                        yield _data(RefusedError(event.message, 500).body)
                        return
                    assert isinstance(event, Piece)
                    yield _data(answer.chunk(event, first=event.choice not in begun))
                    begun.add(event.choice)
                    ends += [event] if event.stopped_by is not None else []
        except RefusedError as refusal:
            yield _data(refusal.body)
            return
        if usage:
            yield _data(answer.last_chunk(ends))
        yield "data: [DONE]\n\n"


def _rules() -> dict[str, Any]:
    """Return the options of each unmasking rule."""
    rules = {name: unmasking_rules.get(name) for name in unmasking_rules.names()}
    return {
        name: {
            "takes_steps": rule.takes_steps,
            "threshold": (option := rule.takes_threshold) and {"default": option.default, "range": option.range},
        }
        for name, rule in rules.items()
    }


def _wants_usage(body: CompletionBody | ChatBody) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return error.response


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_error(error.errors()).response


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    messages = {404: f"there is no {path} here", 405: f"{path} does not accept {request.method}"}
    message = messages.get(error.status_code, str(error.detail))
    return RefusedError(message, error.status_code, headers=error.headers).response


async def _unforeseen(request: Request, error: Exception) -> Response:
    """Answer with the error's type alone; the server prints the traceback, which may hold other clients' text."""
    return RefusedError(f"the server failed: {type(error).__name__}", 500).response
