"""Run ranks that take steps of a run on one layout and write down samples, masks and every state."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from bd3_scale.checkpoint.manifest import CheckpointManifest
from bd3_scale.checkpoint.store import boxes_to_save, save_boxes
from bd3_scale.objective import BlockDiffusion
from bd3_scale.objective.inputs import rank_positions
from bd3_scale.parallel import engine as engine_module
from bd3_scale.parallel.collective import on_rank_zero
from bd3_scale.recipe.schema import Recipe
from bd3_scale.resilience.heartbeat import Heartbeat
from bd3_scale.train.resume import find_start
from bd3_scale.train.setup import Training, open_run, open_training
from bd3_scale.train.step import take_step

# Some of the tiny weights are divided by ZeRO-3, as large ones are.
engine_module.WHOLE_BELOW = 1500


def go(recipe: Recipe, last: int, out: Path) -> None:
    """Train from the newest checkpoint through step `last`, then save; first save again what was loaded."""
    with ExitStack() as stack:
        run = open_run(recipe, stack, Heartbeat())
        on_rank_zero(lambda: run.checkpoints.mkdir(parents=True, exist_ok=True))
        start = find_start(run.recipe, run.checkpoints, run.data)
        training = open_training(run, start)
        if start is not None:
            save(training, start.step, out.with_suffix(".again"))
        losses, seen, began = [], {}, training.state.step
        with recording(training, seen):
            while training.state.step < last:
                result = take_step(training)
                training.state.finish_step(result)
                losses.append(result.loss)
        save(training, last, run.checkpoints)
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, seen)
        if dist.get_rank() == 0:
            torch.save({"losses": losses, "seen": together(everyone), "done": began}, out)


def save(training: Training, step: int, folder: Path) -> None:
    tokenizer = folder.parent / f"tokenizer of {folder.name}"
    on_rank_zero(lambda: (folder.mkdir(parents=True, exist_ok=True), tokenizer.mkdir(exist_ok=True))[1])
    manifest = CheckpointManifest.of_run(
        training.run.recipe,
        step=step,
        vocabulary=training.engine.chunks[0].vocabulary,
        data_hash=training.run.data_hash,
        world_size=dist.get_world_size(),
        states=training.engine.zero.names,
        intervals=training.state.intervals,
        data_order=training.state.order,
    )
    keep = training.run.recipe.checkpoint
    save_boxes(
        folder, manifest, boxes_to_save(training.engine.zero, training.engine.layouts), tokenizer=tokenizer, keep=keep
    )


class recording:
    """Notes the samples that `take_step` makes inputs of, and what became of them on this rank."""

    def __init__(self, training: Training, seen: dict) -> None:
        self._training, self._seen, self._made = training, seen, BlockDiffusion.training_inputs

    def __enter__(self) -> None:
        def note(objective, micro, keys, place):
            made = self._made(objective, micro, keys, place)
            # The noisy copy, at whatever places this rank of a context-parallel group has.
            places = rank_positions(micro.tokens.shape[1], place.context).tolist()
            for row, (sample, epoch) in enumerate(zip(micro.ids.tolist(), micro.epochs.tolist(), strict=True)):
                noisy = zip(places, made.tokens[row, : len(places)].tolist(), strict=True)
                self._seen.setdefault((keys.step, epoch, sample), {}).update(noisy)
            return made

        BlockDiffusion.training_inputs = note

    def __exit__(self, *_: object) -> None:
        BlockDiffusion.training_inputs = self._made


def together(everyone: list[dict]) -> dict:
    """Gather from all ranks a hash of the noisy tokens, by step, epoch and sample; ranks that share it must agree."""
    whole: dict = {}
    for seen in everyone:
        for key, noisy in seen.items():
            here = whole.setdefault(key, {})
            assert all(here.get(place, token) == token for place, token in noisy.items()), (
                f"ranks mask {key} differently"
            )
            here.update(noisy)
    return {key: hashlib.sha256(str(sorted(noisy.items())).encode()).hexdigest() for key, noisy in whole.items()}
