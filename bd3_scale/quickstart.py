"""Train a small model on the text that every Python brings along, kill and resume it, measure it, let it write.

`bd3-scale quickstart` runs the same commands that a person would type, and shows them. It replaces `data/quickstart*`
and `runs/quickstart` of the current folder each time.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from rich.panel import Panel

from bd3_scale.observe.console import Console, styled
from bd3_scale.observe.metrics import METRICS_FILE, read_metrics
from bd3_scale.recipe.library import named_recipe
from bd3_scale.recipe.load import load_recipe
from bd3_scale.resilience.files import check_writable

RECIPE = "quickstart"
RUN = Path("runs/quickstart")
CORPUS, TOKENIZER, DATA = Path("data/quickstart-corpus"), Path("data/quickstart-tokenizer"), Path("data/quickstart")
COMMAND = [sys.executable, "-P", "-m", "bd3_scale"]
NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3", "pydoc_data"}
STEPS_BEFORE_KILL = 20
PROMPT = "class Test"

console = Console(highlight=False)


def quickstart() -> None:
    """Run the quickstart in the current folder. ValueError: the run did not resume exactly, or learnt too little."""
    # The same on every machine: two processes on CPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    began = time.monotonic()
    # Before anything of an earlier quickstart is removed.
    for parent in {CORPUS.parent, RUN.parent}:
        check_writable(parent)
    for folder in (CORPUS, TOKENIZER, DATA, RUN):
        shutil.rmtree(folder, ignore_errors=True)
    _heading(1, "A corpus that every machine has")
    _write_corpus()
    _heading(2, "A tokeniser, and packed shards with a held-out split")
    _run("data", "tokenizer", CORPUS, "--out", TOKENIZER, "--vocab-size", 4096)
    _run("data", "prepare", CORPUS, "--out", DATA, "--tokenizer", TOKENIZER, "--seq-len", 256)
    saved = load_recipe(named_recipe(RECIPE)).checkpoint.every_steps
    _heading(3, f"Training, killed {STEPS_BEFORE_KILL} steps after the checkpoint of step {saved}")
    first = _train_and_kill(saved + STEPS_BEFORE_KILL)
    _heading(4, "Resuming from the checkpoint")
    _run("train", RECIPE)
    exact = _report_exactness({step: loss for step, loss in first.items() if step > saved})
    _heading(5, "Held-out perplexity")
    evaluation = json.loads(_run("evaluate", RUN, "--draws", 2, "--json", capture=True))[0]
    _report_perplexity(evaluation)
    _heading(6, "Text from a prompt, block by block with a KV cache")
    _run("generate", RUN, "--prompt", PROMPT, "--max-new-tokens", 120, "--temperature", 0.7, "--seed", 1)
    _heading(7, "What there is now")
    _report_files(time.monotonic() - began)
    if not exact or evaluation["perplexity"] > evaluation["unigram_perplexity"] / 2:
        raise ValueError("the run did not resume exactly, or learnt too little: see above")


def _heading(number: int, text: str) -> None:
    console.rule(styled((f"{number}. {text}", "bold")), align="left")


def _show(words: list[str]) -> None:
    console.print(styled((f"$ {shlex.join(['bd3-scale', *words])}", "dim")), soft_wrap=True)


def _run(*arguments: object, capture: bool = False) -> str:
    """Show and run a `bd3-scale` command and return its output if captured. SystemExit: it failed, with its code."""
    words = [str(argument) for argument in arguments]
    _show(words)
    done = subprocess.run([*COMMAND, *words], stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout or ""


def _write_corpus() -> None:
    """Write the prose of Python's help topics and the source of its standard library, one document a file."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [p for p in sorted(library.rglob("*.py")) if NOT_SOURCE.isdisjoint(p.relative_to(library).parts)]
    documents = {f"topic-{name}": text for name, text in pydoc_data.topics.topics.items()}
    documents |= {
        ".".join(p.relative_to(library).with_suffix("").parts): p.read_bytes().decode(errors="replace") for p in sources
    }
    CORPUS.mkdir(parents=True)
    for name, text in documents.items():
        if text.strip():
            (CORPUS / f"{name}.txt").write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in CORPUS.iterdir())
    console.print(f"{len(documents)} documents, {size / 1e6:.1f} MB, in {CORPUS}")


def _train_and_kill(last: int) -> dict[int, float]:
    """Train, kill the run once step `last` is done, and return the losses until then by step."""
    words = ["train", RECIPE]
    _show(words)
    # Python's tracker of shared memory would warn of what the kill leaves behind; the next run removes it.
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen([*COMMAND, *words], env=quiet)
    while process.poll() is None:
        if max(_losses(), default=0) >= last:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.2)
    if code := process.wait():
        if code != -signal.SIGKILL:
            raise SystemExit(code)
    else:
        raise ValueError("training ended before it could be killed: see above")
    seen = _losses()
    console.print(f"\nkilled with SIGKILL after step {max(seen)}")
    return seen


def _losses() -> dict[int, float]:
    """Return the training loss (nats a token) by step, of the complete lines of the metrics."""
    return {r["step"]: r["train/loss"] for r in read_metrics(RUN / METRICS_FILE) if "train/loss" in r}


def _report_exactness(first: dict[int, float]) -> bool:
    """Tell whether the resumed run took the steps after its checkpoint again with the losses of the killed one."""
    second = _losses()
    different = [step for step in first if first[step] != second[step]]
    if different or not first:
        console.print(f"the loss sequence did NOT continue exactly: steps {different} differ", style="red")
        return False
    console.print(
        f"the loss sequence continued exactly: steps {min(first)} to {max(first)} were taken twice, "
        "with bitwise equal losses",
        style="green",
    )
    return True


def _report_perplexity(evaluation: dict[str, float]) -> None:
    console.print(
        f"NELBO {evaluation['nelbo']:.3f} ± {evaluation['noise_standard_error']:.3f} nats a token on "
        f"{evaluation['tokens']:,} held-out tokens\n"
        f"perplexity at most {evaluation['perplexity']:.1f}, of the unigram model on the same tokens "
        f"{evaluation['unigram_perplexity']:.1f}"
    )


def _report_files(seconds: float) -> None:
    checkpoint = sorted((RUN / "checkpoints").glob("step-*"))[-1]
    # As a person must type it: with the environment's folder where that is not on the PATH.
    script = Path(sys.executable).with_name("bd3-scale")
    command = "bd3-scale" if shutil.which("bd3-scale") == str(script) else os.path.relpath(script)
    console.print(
        Panel(
            f"recipe       {RUN / 'recipe.yaml'}\n"
            f"metrics      {RUN / METRICS_FILE}\n"
            f"loss curve   {RUN / 'loss.png'}\n"
            f"checkpoint   {checkpoint}\n\n"
            "Try next:\n"
            f"  {command} report {RUN}\n"
            f"  {command} generate {RUN} --prompt 'import '\n"
            f"  {command} serve {RUN}\n"
            f"  {command} train {RECIPE} run_dir=runs/longer train.steps=3000\n"
            f"  {command} train {RECIPE} run_dir=runs/autoregressive diffusion.block_size=1\n"
            f"  {command} train {RECIPE} run_dir=runs/split parallel.tensor=2\n"
            f"  {command} recipe explain\n"
            f"  {command} init my-project",
            title=f"{seconds / 60:.1f} minutes",
            expand=False,
        )
    )
