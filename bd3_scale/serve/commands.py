"""Define the command `bd3-scale serve`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from bd3_scale.generate.config import SamplingConfig, WeightType
from bd3_scale.observe.console import say

app = typer.Typer()
_LIBRARIES = ("fastapi", "prometheus_client", "uvicorn")
KEY = "BD3_SCALE_API_KEY"


@app.command(epilog="Example: bd3-scale serve runs/quickstart --unmasking dynamic")
def serve(
    path: Annotated[
        Path,
        typer.Argument(
            help="A run, a checkpoint, an exported or quantised folder, or a .bd3.gguf file, which llama.cpp runs."
        ),
    ],
    host: Annotated[
        str, typer.Option(help=f"Address to listen at; one that other machines reach needs a key in {KEY}.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port, which is printed.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model for clients.", show_default="that of the path")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=256, help="Texts that are denoised together.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; further requests get status 429.")] = 64,
    cache_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a text in the cache, whose memory is allocated at the start.")
    ] = 4096,
    unmasking: Annotated[
        str, typer.Option(metavar="RULE", help="Default for requests that name none; see `bd3-scale generate --help`.")
    ] = "first-hitting",
    steps: Annotated[int | None, typer.Option(min=1, help="Option of that rule.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Option of that rule.")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt.")] = 8192,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 2048,
    max_seconds: Annotated[float, typer.Option(min=1, help="Most seconds for an answer.")] = 600,
    dtype: WeightType = None,
) -> None:
    """Serve a model to OpenAI clients, with a page at / that shows how a text loses its masks block by block.

    Endpoints: `/v1/completions` and `/v1/chat/completions`, as one answer or as a stream of finished blocks,
    `/v1/models`, `/health` and `/metrics` (Prometheus). Requests join and leave the batch between passes. After SIGTERM
    the server finishes its answers and ends.
    """
    if missing := [library for library in _LIBRARIES if find_spec(library) is None]:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install 'bd3_scale[serve]'")
    from bd3_scale.serve.run import Address, Options, serve_model

    key = os.environ.get(KEY) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(
            f"{KEY} cannot be sent in an HTTP header: use ASCII letters, digits and punctuation, without spaces"
        )
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(
            f"--host {host} lets other machines connect, and no key is set: set {KEY}, or leave out --host"
        )
    defaults = SamplingConfig(unmasking=unmasking, steps=steps, threshold=threshold)
    options = Options(
        name, batch_size, queue, cache_tokens, max_prompt_tokens, max_new_tokens, max_seconds, defaults, dtype
    )
    serve_model(path, Address(host, port, key), options, say)
