"""Load a model from disk and serve it until a signal ends the server."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import uvicorn

from bd3_scale.checkpoint.folder import GGUF_ENDING
from bd3_scale.convert.importer import open_checkpoint
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.source import open_writer
from bd3_scale.generate.writer import Writer
from bd3_scale.serve.engine import Engine
from bd3_scale.serve.server_metrics import ServerMetrics
from bd3_scale.serve.web import Limits, Web

_BODY_BYTES_PER_TOKEN = 32  # of a prompt in JSON: a token has a few characters, of up to 12 bytes each as \uXXXX pairs


@dataclass(frozen=True)
class Address:
    """The address of a server; key: the key that requests must send, None: only this machine can connect."""

    host: str
    port: int
    key: str | None


@dataclass(frozen=True)
class Options:
    """The options of `bd3-scale serve`."""

    name: str | None
    batch_size: int
    queue: int
    cache_tokens: int
    max_prompt_tokens: int
    max_new_tokens: int
    max_seconds: float
    defaults: SamplingConfig
    dtype: Literal["float32", "bfloat16"] | None


def serve_model(path: Path, address: Address, options: Options, say: Callable[..., None]) -> None:
    """Load a model and serve it until SIGTERM or Ctrl-C.

    ValueError, OSError: there is no model, or the port is in use.
    """
    dtype = options.dtype and getattr(torch, options.dtype)
    if os.environ.get("RANK", "0") == "0":
        with _listening(address):
            pass  # a port in use is reported before the model is loaded, which may take minutes
    with _opened(path, dtype) as writer:
        is_rank_zero = not dist.is_initialized() or dist.get_rank() == 0
        metrics = ServerMetrics()
        engine = Engine(
            writer,
            slots=options.batch_size,
            waiting=options.queue,
            cache_tokens=options.cache_tokens,
            metrics=metrics,
        )
        metrics.capacity.set(options.batch_size * engine.capacity)
        engine.check(options.defaults)
        if not is_rank_zero:
            engine.follow()
            return
        web = Web(
            engine,
            name=options.name or path.resolve().name.removesuffix(GGUF_ENDING),
            defaults=options.defaults,
            limits=Limits(
                prompt_tokens=options.max_prompt_tokens,
                new_tokens=options.max_new_tokens,
                seconds=options.max_seconds,
                body_bytes=_BODY_BYTES_PER_TOKEN * options.max_prompt_tokens + 65536,
            ),
            key=address.key,
        )
        with _listening(address) as listener:
            port = listener.getsockname()[1]
            config = uvicorn.Config(web.app, log_level="warning", access_log=False, timeout_keep_alive=30)
            server = uvicorn.Server(config)
            # uvicorn installs its handlers only in `run`; a signal before that would kill the process. Afterwards it
            # raises the signals again that it has caught, for the handlers from before `run`: these, which then do
            # nothing.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, server.handle_exit)
            host = f"[{address.host}]" if ":" in address.host else address.host
            say(f"serving {web.name} at http://{host}:{port}: /v1/completions" + _chat(writer))
            engine.start()
            try:
                server.run(sockets=[listener])
            finally:
                engine.stop()  # before the model is closed: after a second Ctrl-C the thread may still be in a pass


@contextmanager
def _opened(path: Path, dtype: torch.dtype | None) -> Iterator[Writer]:
    """Open a GGUF file, a checkpoint, or a Hugging Face folder, which is imported into a temporary folder meanwhile."""
    if path.suffix == GGUF_ENDING:
        with open_writer(path, dtype) as writer:
            yield writer
        return
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    with open_checkpoint(path) as (checkpoint, template), open_writer(checkpoint, dtype, ranks) as writer:
        yield writer if template is None else replace(writer, chat_template=template)


def _chat(writer: Writer) -> str:
    return ", /v1/chat/completions" if writer.has_chat else " (it has no chat template)"


@contextmanager
def _listening(address: Address) -> Iterator[socket.socket]:
    """Open a listening socket, so that clients can connect as soon as the address is printed. OSError: port in use."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address.host, address.port))
            listener.listen(128)
        except OSError as error:
            raise OSError(
                f"cannot listen on port {address.port} of {address.host} ({error.strerror}): choose another port with "
                "--port"
            ) from error
        yield listener
