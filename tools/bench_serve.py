"""Measure `bd3-scale serve` with 1, 8 and 32 clients, on both backends: tokens per second, first block, and memory.

    OMP_NUM_THREADS=1 python tools/bench_serve.py
    OMP_NUM_THREADS=1 python tools/bench_serve.py --checkpoint runs/quickstart --unmasking dynamic

Without a checkpoint the model is random (126M: 12 layers of 768, a vocabulary of 32,000): the speed of a pass does not
depend on the weights. Each server is a process with OMP_NUM_THREADS threads. Clients stream texts of 64 new tokens
behind prompts of 64, one after another, for some seconds. For comparison, llama.cpp's own server reads the same weights
left to right, with the same type and threads. With a checkpoint, the seconds from the command to the first block are
printed, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).parent))

from bench_gguf import ROWS, SHAPE, random_checkpoint

from bd3_scale.checkpoint.folder import resolve_checkpoint
from bd3_scale.convert.gguf import plan_gguf, write_gguf
from bd3_scale.observe.libraries import quieten_libraries
from bd3_scale.recipe.schema import ModelRecipe
from bd3_scale.resilience.leftovers import temporary_folder

ROOT = Path(__file__).parents[1]
PROMPT_TOKENS, NEW_TOKENS, SLOTS = 64, 64, 8
SERVE = [str(Path(sys.executable).with_name("bd3-scale")), "serve"]


@dataclass
class Tally:
    """Results of clients: new tokens and passes of complete texts, and seconds to the first event of each."""

    tokens: int = 0
    passes: int = 0
    first: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class RunningServer:
    """A running server. name: its model's name."""

    process: subprocess.Popen[str]
    url: str
    name: str
    began: float

    @property
    def mebibytes(self) -> float:
        """Return its peak memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert match
        return int(match[1]) / 1024


@contextmanager
def started(command: list[str], name: str) -> Iterator[RunningServer]:
    """Start a server and wait until it prints its address."""
    began = time.monotonic()
    env = os.environ | {"TERM": "dumb", "COLUMNS": "300", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if match := re.search(r"(http://[\d.]+:\d+)", line):
                    yield RunningServer(process, match[1], name, began)
                    break
            else:
                raise RuntimeError(f"{' '.join(command)} ended with {process.wait()}")
        finally:
            process.terminate()


def ask(server: RunningServer, prompt: list[int], seed: int, tally: Tally) -> None:
    """Stream one text."""
    body = {"model": server.name, "prompt": prompt, "max_tokens": NEW_TOKENS, "seed": seed, "stream": True,
            "stream_options": {"include_usage": True}, "temperature": 1.0}  # fmt: skip
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)
    began, first, usage = time.monotonic(), None, {}
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                first = first or time.monotonic() - began
                usage = json.loads(line[6:]).get("usage") or usage
    with tally.lock:
        tally.tokens += usage["completion_tokens"]
        tally.passes += usage.get("denoising_passes", usage["completion_tokens"])
        tally.first.append(first or 0.0)


def load(server: RunningServer, clients: int, seconds: float) -> dict[str, float]:
    """Return the results of `clients` clients, each of which sends a request as soon as it has its answer."""
    tally, stop = Tally(), time.monotonic() + seconds

    def run(client: int) -> None:
        seed = client
        while time.monotonic() < stop:
            ask(server, [(seed * 7 + i) % 250 for i in range(PROMPT_TOKENS)], seed, tally)
            seed += clients

    ask(server, list(range(PROMPT_TOKENS)), 0, Tally())  # warming up
    began = time.monotonic()
    threads = [threading.Thread(target=run, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    return {
        "tokens/s": tally.tokens / took,
        "first": 1e3 * statistics.median(tally.first),
        "passes": tally.passes / tally.tokens,
        "MiB": server.mebibytes,
    }


def read_left_to_right(file: Path, out: Path) -> Path:
    """Write a copy of a file that llama.cpp reads as an autoregressive model: equal tensors, `causal` set."""
    data = bytearray(file.read_bytes())
    key = b".attention.causal"
    at = data.index(key) + len(key)
    assert data[at : at + 5] == (7).to_bytes(4, "little") + b"\0", "a key of type bool, which is false"
    data[at + 4] = 1
    out.write_bytes(data)
    return out


def rival(file: Path) -> None:
    """Run llama.cpp's own server of a file, on a free port that is printed, until the process is killed."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_parallel, params.n_ctx = SLOTS, SLOTS * 2 * (PROMPT_TOKENS + NEW_TOKENS)
    params.port, params.warmup, params.endpoint_metrics = 0, True, False
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib, params.cache_prompt = 0, False
    server = xllamacpp.Server(params)
    print(f"at {server.listening_address}", flush=True)
    while True:
        time.sleep(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a run or a checkpoint in place of the random model")
    parser.add_argument("--small", action="store_true", help="a random model of 1M, to see the tool work")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--type", default="q4_k_m", help="of the file for llama.cpp")
    parser.add_argument("--unmasking", default="first-hitting")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--rival", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rival:
        rival(options.rival)
        return
    quieten_libraries()
    with temporary_folder("bench") as folder:
        if options.checkpoint:
            checkpoint = resolve_checkpoint(options.checkpoint)
        else:
            small = ModelRecipe(num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128)
            shape, rows = (small, 512) if options.small else (SHAPE, ROWS)
            checkpoint = random_checkpoint(folder, shape, rows)
        plan = plan_gguf(checkpoint, options.type, importance=False)
        write_gguf(plan, folder / plan.name)
        common = ["--port", "0", "--name", "m", "--batch-size", str(SLOTS), "--unmasking", options.unmasking]
        causal = read_left_to_right(folder / plan.name, folder / "causal.gguf")
        commands = {
            "bd3_scale, fp32": [*SERVE, str(checkpoint), *common, "--dtype", "float32"],
            "bd3_scale, bf16": [*SERVE, str(checkpoint), *common, "--dtype", "bfloat16"],
            f"llama.cpp, {options.type}": [*SERVE, str(folder / plan.name), *common],
            f"AR in llama.cpp's server, {options.type}": [sys.executable, __file__, "--rival", str(causal)],
        }
        print("| backend | clients | tokens/s | × 1 client | ms to the first block | passes a token | MiB |")
        print("|---|---|---|---|---|---|---|")
        for backend, command in commands.items():
            alone = 0.0
            with started(command, "m") as server:
                ready = time.monotonic() - server.began
                first = Tally()
                ask(server, list(range(PROMPT_TOKENS)), 0, first)
                for clients in map(int, options.clients.split(",")):
                    results = load(server, clients, options.seconds)
                    alone = alone or results["tokens/s"]
                    print(
                        f"| {backend} | {clients} | {results['tokens/s']:.0f} | {results['tokens/s'] / alone:.2f} "
                        f"| {results['first']:.0f} | {results['passes']:.2f} | {results['MiB']:.0f} |",
                        flush=True,
                    )
                start = f"{backend}: {ready + first.first[0]:.1f} s from the command to the first block"
                print(start, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
