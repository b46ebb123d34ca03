"""Kill ranks of small real runs at random, start them again, and compare with undisturbed runs.

    python tools/fault_campaign.py --kills 100 --seed 1

Each kill is a SIGKILL of one rank, at a named point of the run (`bd3_scale.resilience.faults`) or, every other time, at
a random moment. Then the same command is run again, until the run is complete. A run counts as equal if loss and
gradient norm of every step and the files of the last checkpoint are bitwise those of the undisturbed run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import pydoc_data.topics
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

from bd3_scale.observe.environment import cpu_in_words, read_environment, source_commit
from bd3_scale.observe.progress import Bar
from bd3_scale.resilience.faults import POINTS
from bd3_scale.resilience.files import write_atomically

BD3_SCALE = Path(sys.executable).with_name("bd3-scale")
# Steps of tiny models are slower on two threads.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
STEPS, EVERY = 12, 3
KILLS_A_RUN = 5
ATTEMPT_SECONDS = 300.0
RECIPE: dict[str, Any] = {
    "name": "campaign",
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
    },
    "diffusion": {"block_size": 8, "search_interval": True},
    "data": {"path": "data", "seq_len": 64},
    "optimizer": {"lr": 1e-3, "ema_decay": 0.9},
    "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
    "evaluation": {"every_steps": 4, "sequences": 16},
    "checkpoint": {"every_steps": EVERY, "keep_last": 2},
    "guard": {"replicas_every_steps": 4},
    "logging": {"wandb": {"mode": "disabled"}},
}
_EXPERTS = {
    "model.moe.num_experts": 4,
    "model.moe.top_k": 2,
    "model.moe.ffn_hidden_size": 16,
    "model.moe.bias": "true",
}
LAYOUTS: dict[str, tuple[int, dict[str, int | str]]] = {
    "1 process": (1, {}),
    "TP2": (2, {"parallel.tensor": 2}),
    "PP2": (2, {"parallel.pipeline": 2}),
    "DP2, ZeRO-1": (2, {"parallel.zero_stage": 1}),
    "DP2, ZeRO-3": (2, {"parallel.zero_stage": 3}),
    "CP2": (2, {"parallel.context": 2}),
    "EP2": (2, {"parallel.expert": 2, **_EXPERTS}),
}


@dataclass(frozen=True)
class Kill:
    """A kill: where, after which step, and the step from which the next attempt resumed."""

    layout: str
    where: str
    rank: int
    step: int
    resumed_from: int


@dataclass(frozen=True)
class Attempt:
    """One run of the command: its seconds, and the seconds until its first step that no earlier attempt had taken."""

    code: int
    output: str
    seconds: float
    until_new_step: float | None


class Site:
    """A folder with data, a recipe, and an undisturbed run of each layout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}  # of the undisturbed runs
        text = folder / "text"
        text.mkdir(parents=True)
        for name, topic in list(pydoc_data.topics.topics.items())[:24]:
            (text / f"{name.replace('/', '-')}.txt").write_text(topic)
        data = ["--tokenizer", "bytes", "--seq-len", "64", "--holdout", "0.1", "--out", "data"]
        prepare = [BD3_SCALE, "data", "prepare", "text", *data]
        subprocess.run(prepare, cwd=folder, check=True, capture_output=True, env=ENVIRONMENT)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    def command(self, run: str, layout: str, *more: str) -> list[str]:
        processes, parallel = LAYOUTS[layout]
        overrides = [f"launch.processes={processes}", *(f"{key}={value}" for key, value in parallel.items())]
        return [str(BD3_SCALE), "train", *more, "recipe.yaml", f"run_dir={run}", *overrides]

    def undisturbed(self, layout: str) -> Path:
        """Return the undisturbed run of a layout; it is run once."""
        run = self.folder / f"whole {layout}"
        if not run.exists():
            began = time.monotonic()
            done = subprocess.run(
                self.command(run.name, layout), cwd=self.folder, capture_output=True, text=True, env=ENVIRONMENT
            )
            assert done.returncode == 0, done.stdout + done.stderr
            self.seconds[layout] = time.monotonic() - began
        return run


def steps_of(run: Path) -> dict[int, tuple[float, float, float]]:
    """Return loss, gradient norm and seconds of each step."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    records = [json.loads(line) for line in lines]
    tokens = RECIPE["train"]["global_batch_size"] * RECIPE["data"]["seq_len"]
    return {
        r["step"]: (r["train/loss"], r["train/grad_norm"], tokens / r["perf/tokens_per_second"])
        for r in records
        if "train/loss" in r
    }


def newest(run: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def differences(run: Path, whole: Path) -> list[str]:
    """Return the steps and files that differ from the undisturbed run."""
    replayed, expected = steps_of(run), steps_of(whole)
    different = [f"step {step}" for step in expected if replayed.get(step, ())[:2] != expected[step][:2]]
    last = f"step-{STEPS:08d}"
    for path in sorted((whole / "checkpoints" / last).glob("*.safetensors")):
        twin = run / "checkpoints" / last / path.name
        if not twin.exists() or twin.read_bytes() != path.read_bytes():
            different.append(path.name)
    return different


def attempt(site: Site, run: str, command: list[str], kill_after: tuple[int, float] | None = None) -> Attempt:
    """Run the command once. kill_after: a rank, and the seconds after its start at which it is killed."""
    folder, began = site.folder / run, time.monotonic()
    before, new = max(steps_of(folder), default=0), None
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=site.folder, stdout=output, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
        )
        pid = rank_pid(process.pid, kill_after[0]) if kill_after else None
        started = time.monotonic()
        while process.poll() is None:
            if time.monotonic() - began > ATTEMPT_SECONDS:
                process.kill()
            if pid is not None and kill_after and time.monotonic() - started > kill_after[1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                pid = None
            if new is None and max(steps_of(folder), default=0) > before:
                new = time.monotonic() - began
            time.sleep(0.05)
        output.seek(0)
        return Attempt(process.returncode, output.read(), time.monotonic() - began, new)


def kill_once(site: Site, run: str, layout: str, chance: random.Random) -> tuple[Kill | None, Attempt]:
    """Run the command with a random kill, which may come too late."""
    rank = chance.randrange(LAYOUTS[layout][0])
    if chance.random() < 0.5:
        point, step = (
            chance.choice([p for p in POINTS if p not in ("gradient", "evaluation")]),
            chance.randint(1, STEPS),
        )
        if point.startswith("save."):
            step = -(-step // EVERY) * EVERY
            rank = rank if point == "save.write" else 0
        where, fault = f"{point} of step {step}", f"kill@{point}:rank={rank},step={step}"
        if point == "start":
            where, fault = point, f"kill@{point}:rank={rank}"
        made = attempt(site, run, site.command(run, layout, "--inject", fault))
    else:
        where = "a random moment"
        made = attempt(site, run, site.command(run, layout), (rank, chance.uniform(0, site.seconds[layout])))
    if made.code == 0:
        return None, made
    assert made.code == 128 + signal.SIGKILL, f"{layout}, {where}, rank {rank}: exit code {made.code}\n{made.output}"
    folder = site.folder / run
    return Kill(layout, where, rank, max(steps_of(folder), default=0), newest(folder)), made


def rank_pid(launcher: int, rank: int) -> int | None:
    """Wait for a rank's process and return its id: the launcher starts the ranks in order, and nothing else."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children = Path(f"/proc/{launcher}/task/{launcher}/children")
        pids = children.read_text().split() if children.exists() else []
        if len(pids) > rank:
            return int(pids[rank])
        time.sleep(0.05)
    return None


def run_campaign(
    site: Site, kills: int, seed: int, progress: Callable[[int, int], object] = lambda done, total: None
) -> dict[str, Any]:
    """Kill ranks `kills` times, a few times per run, over all layouts in turn; return all kills, runs and costs."""
    chance = random.Random(seed)
    killed: list[Kill] = []
    runs: list[dict[str, Any]] = []
    recoveries: list[float] = []
    useful = wall = 0.0
    for number, layout in enumerate(itertools.cycle(LAYOUTS), 1):
        if len(killed) >= kills:
            break
        whole, run, count = site.undisturbed(layout), f"run {number} {layout}", 0
        while True:
            if len(killed) < kills and count < KILLS_A_RUN:
                kill, made = kill_once(site, run, layout, chance)
            else:
                kill, made = None, attempt(site, run, site.command(run, layout))
                assert made.code == 0, made.output
            wall += made.seconds
            if count and made.until_new_step is not None:
                recoveries.append(made.until_new_step)
            if kill is None:
                break
            killed.append(kill)
            count += 1
            progress(len(killed), kills)
        useful += sum(seconds for _, _, seconds in steps_of(site.folder / run).values())
        runs.append({"layout": layout, "kills": count, "different": differences(site.folder / run, whole)})
        shutil.rmtree(site.folder / run)
    return {
        "seed": seed,
        "kills": [asdict(kill) for kill in killed],
        "runs": runs,
        "goodput": useful / wall,
        "seconds_to_new_step": median(recoveries) if recoveries else None,
    }


def as_markdown(results: dict[str, Any]) -> str:
    """Return the table of a campaign, with its conditions."""
    here = read_environment()
    lines = []
    for layout in LAYOUTS:
        own = [run for run in results["runs"] if run["layout"] == layout]
        kills = [kill for kill in results["kills"] if kill["layout"] == layout]
        equal = sum(not run["different"] for run in own)
        lost = sum(kill["step"] - kill["resumed_from"] for kill in kills)
        lines.append(f"| {layout} | {len(own)} | {len(kills)} | {equal} | {lost} |")
    points = Counter(kill["where"].partition(" of ")[0] for kill in results["kills"])
    until = results["seconds_to_new_step"]
    return "\n".join(
        [
            "# Fault campaign",
            "",
            f"{len(results['kills'])} SIGKILLs of a rank of small runs ({STEPS} steps, a checkpoint every {EVERY}), "
            "each followed by the same command again. A run is equal where losses, gradient norms and the last "
            "checkpoint are bitwise those of a run that nobody disturbed.",
            "",
            f"- hardware: {cpu_in_words()}",
            f"- versions: python {platform.python_version()}, torch {here.versions['torch']}",
            f"- commit: {source_commit()}",
            f"- command: python tools/fault_campaign.py --kills {len(results['kills'])} --seed {results['seed']}",
            "",
            "| layout | runs | kills | equal | steps taken again |",
            "|---|---|---|---|---|",
            *lines,
            "",
            f"Kills: {', '.join(f'{count} at {where}' for where, count in sorted(points.items()))}.",
            "",
            f"From the start of an attempt to a step that none before had taken: {until:.1f} s in the median. "
            f"Goodput, the time of useful steps over all: {results['goodput']:.1%}; of steps of milliseconds, beside "
            "starts of seconds, it says what starts cost."
            if until is not None
            else "",
        ]
    )


def main(
    kills: Annotated[int, typer.Option(min=1, help="SIGKILLs in all.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the kills.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Also write the table to this file, in Markdown.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Kill ranks of small real runs at random; exit code 1 if a run differs from the undisturbed one."""
    with tempfile.TemporaryDirectory(prefix="bd3_scale-faults-") as folder, Bar("kills") as bar:

        def show(done: int, total: int) -> None:
            bar.show(done, total)
            if done % 10 == 0 and not sys.stderr.isatty():
                typer.echo(f"{done} of {total} kills", err=True)

        results = run_campaign(Site(Path(folder) / "site"), kills, seed, show)
    text = as_markdown(results)
    if out is not None:
        write_atomically(out, text + "\n")
    if as_json:
        typer.echo(json.dumps(results))
    else:
        typer.echo(text)
    if any(run["different"] for run in results["runs"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
