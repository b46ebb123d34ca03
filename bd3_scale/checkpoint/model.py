"""A model alone, without its optimiser, from a checkpoint of any topology."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bd3_scale.checkpoint.manifest import CheckpointManifest, read_manifest
from bd3_scale.checkpoint.sizes import check_sizes
from bd3_scale.checkpoint.store import load_weights
from bd3_scale.model.build import build_model
from bd3_scale.model.layout import parameter_layouts
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.parallel.groups import ProcessGroups, local_device, process_groups
from bd3_scale.recipe.schema import ParallelRecipe


@contextmanager
def open_model(
    checkpoint: Path, dtype: torch.dtype | None = None
) -> Iterator[tuple[BlockDiffusionTransformer, CheckpointManifest, ProcessGroups]]:
    """The averaged weights where kept, else the last ones, in `dtype` or the training's, and the process groups.

    In one process the model is whole; under torchrun or SLURM its matrices are split over as many ranks as in training
    where this version can tell how many these were, and the other ranks are replicas.

    Raises:
        ValueError: the checkpoint is incomplete or damaged.
    """
    manifest = read_manifest(checkpoint)
    check_sizes(checkpoint, manifest)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    trained = None if alone else manifest.trained_parallel()
    parallel = ParallelRecipe(tensor=trained.tensor if trained else 1)
    dtype = dtype or (torch.bfloat16 if manifest.precision == "bf16" else torch.float32)
    with process_groups(parallel) as groups:
        (model,) = build_model(
            manifest.model,
            manifest.vocabulary,
            groups,
            parallel=parallel,
            dtype=dtype,
            device=local_device(),
            seed=None,
        )
        load_weights(checkpoint, manifest, parameter_layouts([model]))
        yield model.eval(), manifest, groups
