"""From a model on disk to a server that answers until it is told to end."""

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
from bd3_scale.serve.meters import Meters
from bd3_scale.serve.web import Limits, Web

_BODY_BYTES_PER_TOKEN = 32


@dataclass(frozen=True)
class Address:
    """State where a server is asked; key: which requests must bear, None: only this machine asks."""

    host: str
    port: int
    key: str | None


@dataclass(frozen=True)
class Options:
    """Hold the options of `bd3-scale serve`."""

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
    """Open a model and answer until SIGTERM or Ctrl-C.

    ValueError, OSError: there is no model, or the port is taken.
    """
    dtype = options.dtype and getattr(torch, options.dtype)
    if os.environ.get("RANK", "0") == "0":
        with _listening(address):
            pass  # before a model is loaded for nothing
    with _opened(path, dtype) as writer:
        leads = not dist.is_initialized() or dist.get_rank() == 0
        meters = Meters()
        engine = Engine(
            writer,
            slots=options.batch_size,
            waiting=options.queue,
            cache_tokens=options.cache_tokens,
            meters=meters,
        )
        meters.capacity.set(options.batch_size * engine.capacity)
        engine.check(options.defaults)
        if not leads:
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
            # It knows of a signal that comes before it runs; what it gives on, at its end, changes nothing any more.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, server.handle_exit)
            host = f"[{address.host}]" if ":" in address.host else address.host
            say(f"serving {web.name} at http://{host}:{port}: /v1/completions" + _chat(writer))
            engine.start()
            try:
                server.run(sockets=[listener])
            finally:
                engine.stop()  # at a second Ctrl-C, which waits for no answers, it computes with what is closed next


@contextmanager
def _opened(path: Path, dtype: torch.dtype | None) -> Iterator[Writer]:
    """Open a GGUF file, a checkpoint, or a folder of Hugging Face, which is imported for as long."""
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
    """Listen: whoever is told of the address may connect at once. OSError: the port is taken."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address.host, address.port))
            listener.listen(128)
        except OSError as error:
            raise OSError(
                f"port {address.port} of {address.host} cannot be listened on ({error.strerror}): choose another with "
                "--port"
            ) from error
        yield listener
