"""Measure what a checkpoint costs a run: seconds that training waits, slower steps during the save, the save and the
load.

OMP_NUM_THREADS=1 python tools/bench_checkpoint.py
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

from bd3_scale.observe.environment import cpu_in_words, read_environment, source_commit

STEPS_BETWEEN = 6


def measure(folder: Path, layers: int, hidden: int, saves: int) -> dict[str, Any]:
    """Measure steps, and saves during steps, on every rank of a data-parallel group (collective)."""
    import torch
    import torch.distributed as dist

    from bd3_scale.checkpoint.manifest import CheckpointManifest
    from bd3_scale.checkpoint.newest import newest_sound
    from bd3_scale.checkpoint.saver import CheckpointSaver
    from bd3_scale.checkpoint.store import boxes_to_save, load_training_state
    from bd3_scale.model.build import build_model
    from bd3_scale.model.layout import parameter_layouts
    from bd3_scale.observe.environment import peak_rss_bytes
    from bd3_scale.parallel.engine import TrainingEngine
    from bd3_scale.parallel.groups import process_groups
    from bd3_scale.recipe.schema import DataRecipe, DiffusionRecipe, ModelRecipe, Recipe, TrainRecipe
    from bd3_scale.recipe.vocabulary import Vocabulary
    from tools.step_timing import makers

    recipe = Recipe(
        name="bench",
        model=ModelRecipe(num_layers=layers, hidden_size=hidden, num_attention_heads=8, ffn_hidden_size=3 * hidden),
        diffusion=DiffusionRecipe(block_size=8),
        data=DataRecipe(path="unused", seq_len=64),
        train=TrainRecipe(steps=1, global_batch_size=2, micro_batch_size=1, precision="fp32"),
    )
    vocabulary = Vocabulary(size=258, eos_id=256, mask_id=257)
    device = torch.device("cpu")
    with ExitStack() as stack:
        groups = stack.enter_context(process_groups(recipe.parallel))
        chunks = build_model(recipe.model, vocabulary, groups, dtype=torch.float32, device=device, seed=1)
        layouts = parameter_layouts(chunks)
        engine = TrainingEngine(chunks, groups, recipe.optimizer, recipe.parallel)
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir(exist_ok=True)
        saver = CheckpointSaver(folder / "checkpoints", tokenizer, recipe.checkpoint)
        inputs = makers(recipe, vocabulary, groups)["bd3"](0)
        without_save, during_save, ended = [], [], []
        engine.step(inputs, tokens=128, lr=1e-4)
        step, before = 1, peak_rss_bytes()
        for _ in range(saves):
            for _ in range(STEPS_BETWEEN):
                without_save.append(_seconds(lambda: engine.step(inputs, tokens=128, lr=1e-4)))
                step += 1
            manifest = CheckpointManifest.of_run(
                recipe, step=step, vocabulary=vocabulary, states=engine.zero.names, world_size=dist.get_world_size()
            )
            saver.begin(manifest, boxes_to_save(engine.zero, layouts))
            while saver.in_flight:
                during_save.append(_seconds(lambda: engine.step(inputs, tokens=128, lr=1e-4)))
                step += 1
            ended += saver.ended(wait=True)
        dist.barrier()
        verified = _seconds(lambda: newest_sound(folder / "checkpoints", "full"))
        newest = newest_sound(folder / "checkpoints", "fast")
        assert newest is not None
        loaded = _seconds(lambda: load_training_state(*newest, engine.zero, layouts))
        return {
            "parameters": sum(p.numel() for chunk in chunks for p in chunk.parameters()),
            "gigabytes": sum(record.bytes for record in newest[1].files.values()) / 1e9,
            "blocked": [saved.blocked for saved in ended],
            "save": [saved.seconds for saved in ended],
            "step": median(without_save),
            "step_during_save": median(during_save) if during_save else None,
            "verify": verified,
            "load": loaded,
            "extra_bytes": peak_rss_bytes() - before,
        }


def _seconds(action: Any) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main(
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 12,
    hidden: Annotated[int, typer.Option(help="Its width.")] = 640,
    saves: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Also write the table to this file, in Markdown.")] = None,
    rank_of: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure saves and loads on two data-parallel processes."""
    if rank_of is not None:
        results = measure(rank_of, layers, hidden, saves)
        if os.environ["RANK"] == "0":
            (rank_of / "found.json").write_text(json.dumps(results))
        return
    from bd3_scale.launch.local import launch

    with tempfile.TemporaryDirectory(prefix="bd3_scale-bench-", dir=".") as place:
        folder = Path(place).absolute()
        (folder / "checkpoints").mkdir()
        sizes = ["--layers", str(layers), "--hidden", str(hidden), "--saves", str(saves)]
        argv = [sys.executable, __file__, "--rank-of", str(folder), *sizes]
        if code := launch(argv, 2, 1, folder / "logs"):
            raise typer.Exit(code)
        text = as_markdown(json.loads((folder / "found.json").read_text()))
    if out is not None:
        out.write_text(text + "\n")
    typer.echo(text)


def as_markdown(results: dict[str, Any]) -> str:
    """Return the table with its conditions."""
    here = read_environment()
    during = results["step_during_save"]
    slowdown = "no step ran during a save" if during is None else f"{during / results['step'] - 1:+.1%}"
    rows = {
        "training waits for its start": f"{median(results['blocked']):.3f} s (at most {max(results['blocked']):.3f})",
        "steps during a save": f"{slowdown} (of {results['step']:.3f} s)",
        "until it is complete": f"{median(results['save']):.2f} s",
        "verification by hash": f"{results['verify']:.2f} s",
        "load": f"{results['load']:.2f} s",
        "memory of a rank beyond training's": f"{results['extra_bytes'] / 1e6:.0f} MB",
    }
    return "\n".join(
        [
            f"{results['parameters'] / 1e6:.1f} M parameters, {results['gigabytes']:.2f} GB, "
            "two data-parallel processes.",
            "",
            f"- hardware: {cpu_in_words()}, one thread a process",
            f"- versions: python {platform.python_version()}, torch {here.versions['torch']}",
            f"- commit: {source_commit()}",
            "- command: OMP_NUM_THREADS=1 python tools/bench_checkpoint.py",
            "",
            "| a checkpoint | median |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
        ]
    )


if __name__ == "__main__":
    typer.run(main)
