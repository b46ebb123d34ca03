"""Run one training and its measurements in a process: `python -m reproduction.worker JOB.json`.

The results become a record, a JSON file that appears when all of them are complete. An interrupted job resumes from its
newest checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bd3_scale.checkpoint.folder import resolve_checkpoint
from bd3_scale.checkpoint.model import open_model
from bd3_scale.data.batch import Batch
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.stream import held_out_batches
from bd3_scale.diffusion.interval import candidates
from bd3_scale.evaluate.generative import Judge, score_samples
from bd3_scale.evaluate.nelbo import HeldOut, evaluate_nelbo, token_nll, weighted_sums
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.source import open_writer
from bd3_scale.generate.writer import Written
from bd3_scale.objective import BlockDiffusion, Objective
from bd3_scale.observe.libraries import quieten_libraries
from bd3_scale.observe.metrics import METRICS_FILE, read_metrics
from bd3_scale.parallel.groups import placement
from bd3_scale.recipe.schema import DataRecipe
from reproduction.autoregressive import export, write_autoregressively
from reproduction.records import write_record
from reproduction.rows import LONG

COMMAND = Path(sys.executable).with_name("bd3-scale")
BATCH = 64
NUCLEUS = 0.9
# Further samplers for L'=16, besides first hitting.
SAMPLERS: dict[str, dict[str, Any]] = {
    "ancestral, 16 steps": {"unmasking": "ancestral", "steps": 16},
    "ancestral, 64 steps": {"unmasking": "ancestral", "steps": 64},
    "static, 8 passes": {"unmasking": "static", "steps": 8},
    "static, 4 passes": {"unmasking": "static", "steps": 4},
    "dynamic, above 0.9": {"unmasking": "dynamic"},
    "dynamic, above 0.6": {"unmasking": "dynamic", "threshold": 0.6},
    "entropy, 0.1 nats": {"unmasking": "entropy"},
    "entropy, 1 nat": {"unmasking": "entropy", "threshold": 1.0},
}


def main() -> None:
    """Run the job of the file that the command line names."""
    job = json.loads(Path(sys.argv[1]).read_text())
    quieten_libraries()
    torch.set_num_threads(1)
    run = Path(job["run_dir"])
    train(job, run)
    checkpoint = resolve_checkpoint(run)
    record = {
        "row": job["row"],
        "seed": job["seed"],
        "asked": job["asked"],
        "training": training(run),
        "texts": measure(checkpoint, job),
    }
    if job["exports"]:
        export(checkpoint, Path(job["judge"]) if job["row"] == "judge" else run / "exported")
    if job["writes"]:
        record["samples"] = samples(checkpoint, run, job)
    write_record(Path(job["record"]), record)


def train(job: dict[str, Any], run: Path) -> None:
    """Train, from the newest checkpoint on; a finished run is not changed."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "output.txt").open("a") as output:
        subprocess.run(
            [COMMAND, "train", job["recipe"], *job["overrides"]],
            check=True,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"COLUMNS": "120"},
        )


def training(run: Path) -> dict[str, Any]:
    """Summarise a run's metrics: tokens, seconds of all steps, losses and gradient norms by step, and the searches."""
    metrics = read_metrics(run / METRICS_FILE)
    by_step = {record["step"]: record for record in metrics if "train/loss" in record}
    steps = [by_step[step] for step in sorted(by_step)]
    before = [0, *(record["train/tokens"] for record in steps)]
    seconds = sum((r["train/tokens"] - b) / r["perf/tokens_per_second"] for r, b in zip(steps, before, strict=False))
    # Records have these names without a prefix, as in the metrics of earlier versions.
    searches = [
        {key.removeprefix("interval/"): value for key, value in record.items() if key.startswith("interval/")}
        | {"step": record["step"]}
        for record in metrics
    ]
    return {
        "tokens": int(before[-1]),
        "seconds": seconds,
        "losses": [round(record["train/loss"], 5) for record in steps],
        "grad_norms": [round(record["train/grad_norm"], 5) for record in steps],
        "searches": [search for search in searches if any(key.startswith("mask_rate_low") for key in search)],
    }


def measure(checkpoint: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Return each sequence's NELBO given its first token, and its counted tokens, by text and block size.

    An autoregressive model does not predict a sequence's first token, so no row has to: it is never masked. For
    held-out text the variance of the loss by clipped interval and its moments by mask rate are returned, too.
    """
    results: dict[str, Any] = {}
    with open_model(checkpoint) as (model, manifest, groups):
        trained = manifest.trained_objective()
        for text, path in job["texts"].items():
            count = job["asked"]["sequences"]
            for size in job["block_sizes"]:
                objective = trained.at(size)
                draws = objective.num_draws(job["asked"]["draws"])
                nats, tokens = [], []
                for batch in batches(path, manifest.max_position_embeddings, count):
                    more = sequence_nats(model, groups, batch, objective, draws)
                    nats += more[0]
                    tokens += more[1]
                results[f"{text}, L'={size}"] = {"nats": nats, "tokens": tokens}
                if text == "held-out" and type(objective) is BlockDiffusion:
                    held_out = evaluate_nelbo(
                        [model],
                        batches(path, manifest.max_position_embeddings, count),
                        groups,
                        objective=objective,
                        draws=draws,
                    )
                    results[f"{text}, L'={size}"] |= {
                        "intervals": [asdict(interval) for interval in held_out.intervals().variances],
                        "rates": moments_by_rate(held_out, size),
                    }
    return results


def moments_by_rate(held_out: HeldOut, block_size: int) -> list[list[float]]:
    """Return, for each tenth of mask rates in [0, 1], the number of blocks and the sums of losses and their squares.

    Moments add up over rates, so a tenth is the difference between two candidate intervals of the search. At block size
    1 every rate is 1, and the result is empty.
    """
    if block_size == 1 or held_out.moments is None:
        return []
    known = dict(zip(candidates(block_size), held_out.moments.sum(1), strict=True))
    lower = [known[k / 10, (k + 6) / 10] - known[(k + 1) / 10, (k + 6) / 10] for k in range(5)]
    upper = [known[(k - 5) / 10, (k + 1) / 10] - known[(k - 5) / 10, k / 10] for k in range(5, 10)]
    return [tenth.tolist() for tenth in (*lower, *upper)]


def batches(path: str, seq_len: int, sequences: int | None) -> Iterator[Batch]:
    """Yield batches of held-out sequences, in which documents see each other."""
    recipe = DataRecipe(path=path, seq_len=seq_len, isolate_documents=False)
    return held_out_batches(recipe, load_manifest(path), batch_size=BATCH, dp_rank=0, dp_size=1, sequences=sequences)


@torch.no_grad()
def sequence_nats(
    model: Any, groups: Any, batch: Batch, objective: Objective, draws: int
) -> tuple[list[float], list[int]]:
    """Return NELBO in nats and counted tokens of each sequence, given its first token."""
    real = batch.ids >= 0
    later = torch.arange(batch.tokens.shape[1]) > 0
    batch = replace(batch, counted=batch.counted & later)
    place = placement(groups)
    if isinstance(objective, BlockDiffusion):
        noises = [objective.evaluation_noise(batch, draw, draws) for draw in range(draws)]
        # Padding is always masked, as in every evaluation; the first token never.
        noises = [replace(noise, masked=(noise.masked | ~batch.counted) & later) for noise in noises]
        drawn = [objective.draw_of(batch, noise, place=place) for noise in noises]
    else:
        drawn = objective.evaluation_draws(batch, draws, always=batch.padding, place=place)
    sums = weighted_sums(drawn, token_nll([model], drawn, groups), batch.counted).mean(0)
    return [round(float(s), 4) for s in sums[real]], batch.counted.sum(1)[real].tolist()


def samples(checkpoint: Path, run: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Return the judge's figures of texts without a prompt, with nucleus 0.9, by sampler."""
    judge = Judge(Path(job["judge"]))
    length, size = job["length"], max(job["block_sizes"])
    if job["row"] == "ar":
        texts = write_autoregressively(
            run / "exported", job["asked"]["samples"], length, seed=job["seed"], top_p=NUCLEUS
        )
        return {"one by one": judgement(checkpoint, texts, judge)}
    samplers: dict[str, dict[str, Any]] = {"first-hitting": {}} | (SAMPLERS if job["row"] == "l16" else {})
    # MDLM generates exactly one block, which cannot be longer.
    samplers |= {LONG: {"max_new_tokens": 8 * length}} if size < length else {}
    common = {"max_new_tokens": length, "seed": job["seed"] * 10_000, "top_p": NUCLEUS}
    figures, count = {}, job["asked"]["samples"]
    with open_writer(checkpoint) as writer:
        for name, options in samplers.items():
            texts = list(writer.write([""] * count, SamplingConfig(**common | options), batch_size=count))
            figures[name] = judgement(checkpoint, texts, judge) | {"seconds": texts[0].seconds}
    return figures


def judgement(checkpoint: Path, texts: list[Written], judge: Judge) -> dict[str, Any]:
    """Return the judge's figures without paths of this machine."""
    return {
        k: v for k, v in asdict(score_samples(checkpoint, texts, judge)).items() if k not in ("checkpoint", "judge")
    }


if __name__ == "__main__":
    main()
