"""Compute, as one rank of a layout, logits of an imported model through all stages, and save it as a training does."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from bd3_scale.attention.spans import make_spans
from bd3_scale.checkpoint.manifest import TOKENIZER, CheckpointManifest, read_manifest
from bd3_scale.checkpoint.store import boxes_to_save, load_initial_weights, load_weights, save_boxes
from bd3_scale.model.build import build_model
from bd3_scale.model.layout import parameter_layouts
from bd3_scale.parallel.engine import TrainingEngine
from bd3_scale.parallel.groups import process_groups
from bd3_scale.recipe.schema import (
    CheckpointRecipe,
    DataRecipe,
    DiffusionRecipe,
    OptimizerRecipe,
    ParallelRecipe,
    Recipe,
    TrainRecipe,
)


def logits_and_training_checkpoint(checkpoint: Path, parallel: dict, ids: torch.Tensor, out: Path) -> None:
    """Write `out/logits.pt` and the checkpoint `out/step-00000000` of a training that has taken no step."""
    manifest = read_manifest(checkpoint)
    recipe = Recipe(
        name="converted",
        model=manifest.model,
        diffusion=DiffusionRecipe(block_size=manifest.block_size, objective=manifest.objective),
        data=DataRecipe(path="unused", seq_len=ids.shape[1]),
        train=TrainRecipe(steps=1, global_batch_size=1, micro_batch_size=1, precision="fp32"),
        parallel=ParallelRecipe(**parallel),
        optimizer=OptimizerRecipe(ema_decay=0.5),
    )
    with process_groups(recipe.parallel) as groups:
        how = {"dtype": torch.float32, "device": torch.device("cpu"), "parallel": recipe.parallel}
        (model,) = build_model(recipe.model, manifest.vocabulary, groups, seed=None, **how)
        load_weights(checkpoint, manifest, parameter_layouts([model]))
        with torch.no_grad():
            found = clean_logits(model, ids, manifest.block_size, groups)
        if found is not None and groups.tp.rank() == 0:
            torch.save(found, out / "logits.pt")
        chunks = build_model(recipe.model, manifest.vocabulary, groups, seed=7, **how)
        layouts = parameter_layouts(chunks)
        engine = TrainingEngine(chunks, groups, recipe.optimizer, recipe.parallel)
        load_initial_weights(checkpoint, manifest, engine.zero, layouts)
        saved = CheckpointManifest.of_run(
            recipe,
            step=0,
            vocabulary=manifest.vocabulary,
            world_size=dist.get_world_size(),
            states=engine.zero.names,
        )
        save_boxes(
            out,
            saved,
            boxes_to_save(engine.zero, layouts),
            tokenizer=checkpoint / TOKENIZER,
            keep=CheckpointRecipe(keep_last=1),
        )


def clean_logits(model, ids: torch.Tensor, block_size: int, groups) -> torch.Tensor | None:
    """Return the clean-only forward's logits through all stages, on the last stage."""
    batch, length = ids.shape
    positions = torch.arange(length).expand(batch, -1)
    spans = make_spans(torch.zeros(batch, length, dtype=torch.int32), block_size)
    stage, last = groups.pp.rank(), groups.pp.size() - 1
    if stage > 0:
        hidden = torch.empty(length, batch, model.config.hidden_size)
        dist.recv(hidden, dist.get_global_rank(groups.pp, stage - 1), group=groups.pp)
        model.set_input_tensor([hidden])
    if stage == last:
        return model.clean_logits(ids, positions, spans)
    hidden = model._decode(ids, positions, 0, spans)
    dist.send(hidden, dist.get_global_rank(groups.pp, stage + 1), group=groups.pp)
    return None
