"""`make quickstart`: from the text that every Python brings along to a trained, measured, generating model.

It uses the same commands that a person would type, and shows them. What it makes lies in `data/quickstart*` and
`runs/quickstart`, which it replaces each time.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from rich.console import Console
from rich.panel import Panel

from bd3_scale.recipe.load import load_recipe

RECIPE = Path("recipes/quickstart.yaml")
RUN = Path("runs/quickstart")
CORPUS, TOKENIZER, DATA = Path("data/quickstart-corpus"), Path("data/quickstart-tokenizer"), Path("data/quickstart")
COMMAND = Path(os.path.relpath(Path(sys.executable).with_name("bd3-scale")))
NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3", "pydoc_data"}
STEPS_BEFORE_KILL = 20
PROMPT = "class Test"

console = Console(highlight=False)

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same on every machine: two processes on CPU


def main() -> None:
    began = time.monotonic()
    for folder in (CORPUS, TOKENIZER, DATA, RUN):
        shutil.rmtree(folder, ignore_errors=True)
    heading(1, "A corpus that every machine has")
    write_corpus()
    heading(2, "A tokeniser, and packed shards with a held-out split")
    run("data", "tokenizer", CORPUS, "--out", TOKENIZER, "--vocab-size", 4096)
    run("data", "prepare", CORPUS, "--out", DATA, "--tokenizer", TOKENIZER, "--seq-len", 256)
    saved = load_recipe(RECIPE).checkpoint.every_steps
    heading(3, f"Training, killed {STEPS_BEFORE_KILL} steps after the checkpoint of step {saved}")
    first = train_and_kill(saved + STEPS_BEFORE_KILL)
    heading(4, "Resuming from the checkpoint")
    run("train", RECIPE)
    exact = say_whether_exact({step: loss for step, loss in first.items() if step > saved})
    heading(5, "Held-out perplexity")
    evaluation = json.loads(run("evaluate", RUN, "--draws", 2, "--json", capture=True))[0]
    say_perplexity(evaluation)
    heading(6, "Text from a prompt, block by block with a KV cache")
    run("generate", RUN, "--prompt", PROMPT, "--max-new-tokens", 120, "--temperature", 0.7, "--seed", 1)
    heading(7, "What there is now")
    say_where(time.monotonic() - began)
    if not exact or evaluation["perplexity"] > evaluation["unigram_perplexity"] / 2:
        sys.exit("error: the run did not resume exactly, or learnt too little; see above")


def heading(number: int, text: str) -> None:
    console.rule(f"[bold]{number}. {text}", align="left")


def run(*arguments: object, capture: bool = False) -> str:
    """Show and run a `bd3-scale` command; a failure ends the quickstart with the command's exit code."""
    words = [str(argument) for argument in arguments]
    console.print("[dim]$ bd3-scale", *(json.dumps(w) if " " in w else w for w in words), style="dim", soft_wrap=True)
    done = subprocess.run([COMMAND, *words], stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def write_corpus() -> None:
    """The prose of Python's help topics and the source of its standard library, one document a file."""
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


def train_and_kill(last: int) -> dict[int, float]:
    """Train, and kill the run outright once step `last` is done; returns the losses seen until then."""
    console.print(f"[dim]$ bd3-scale train {RECIPE}")
    # Python's tracker of shared memory would warn of what the kill leaves behind; the next run removes it.
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen([COMMAND, "train", str(RECIPE)], env=quiet)
    while process.poll() is None:
        if max(losses(), default=0) >= last:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.2)
    if process.wait() != -signal.SIGKILL:
        sys.exit(process.returncode or "error: training ended before it could be killed; see above")
    seen = losses()
    console.print(f"\nkilled with SIGKILL after step {max(seen)}")
    return seen


def losses() -> dict[int, float]:
    """Training loss by step, of the complete lines of the metrics."""
    path = RUN / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def say_whether_exact(first: dict[int, float]) -> bool:
    """Compare the steps that were taken before the kill, and not saved, with what the resumed run made of them."""
    second = losses()
    different = [step for step in first if first[step] != second[step]]
    if different or not first:
        console.print(f"[red]the loss sequence did NOT continue exactly: steps {different} differ")
        return False
    console.print(
        f"[green]the loss sequence continued exactly: steps {min(first)} to {max(first)} were taken twice, "
        "with bitwise equal losses"
    )
    return True


def say_perplexity(evaluation: dict[str, float]) -> None:
    console.print(
        f"NELBO {evaluation['nelbo']:.3f} ± {evaluation['noise_standard_error']:.3f} nats a token on "
        f"{evaluation['tokens']:,} held-out tokens\n"
        f"perplexity at most [bold]{evaluation['perplexity']:.1f}[/bold], of the unigram model on the same tokens "
        f"{evaluation['unigram_perplexity']:.1f}"
    )


def say_where(seconds: float) -> None:
    checkpoint = sorted((RUN / "checkpoints").glob("step-*"))[-1]
    console.print(
        Panel(
            f"recipe       {RUN / 'recipe.yaml'}\n"
            f"metrics      {RUN / 'metrics.jsonl'}\n"
            f"loss curve   {RUN / 'loss.png'}\n"
            f"checkpoint   {checkpoint}\n\n"
            "Try next:\n"
            f"  {COMMAND} generate {RUN} --prompt 'import '\n"
            f"  {COMMAND} train {RECIPE} run_dir=runs/longer train.steps=3000\n"
            f"  {COMMAND} train {RECIPE} run_dir=runs/autoregressive diffusion.block_size=1\n"
            f"  {COMMAND} train {RECIPE} run_dir=runs/split parallel.tensor=2\n"
            f"  {COMMAND} train {RECIPE} run_dir=runs/stages parallel.pipeline=2\n"
            f"  {COMMAND} train --help",
            title=f"{seconds / 60:.1f} minutes",
            expand=False,
        )
    )


if __name__ == "__main__":
    main()
