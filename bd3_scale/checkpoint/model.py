"""Load a model without its optimiser, from a checkpoint of any topology."""

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
from bd3_scale.parallel.groups import ProcessGroups, is_alone, local_device, lone_groups, process_groups
from bd3_scale.recipe.schema import ParallelRecipe


@contextmanager
def open_model(
    checkpoint: Path, dtype: torch.dtype | None = None, tensor: int | None = None
) -> Iterator[tuple[BlockDiffusionTransformer, CheckpointManifest, ProcessGroups]]:
    """Load a model and yield it with its manifest and the process groups.

    The weights are the averaged ones if the training kept them, else the last ones, in `dtype` or that of the training.
    In one process the model is whole. Under torchrun or SLURM its matrices are split over `tensor` ranks, by default
    over as many as in training if this version can read that from the manifest; the remaining ranks are replicas.

    Raises:
        ValueError: the checkpoint is incomplete or damaged.
    """
    manifest = read_manifest(checkpoint)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        groups = lone_groups()
        yield load_model(checkpoint, manifest, groups, dtype=dtype), manifest, groups
        return
    trained = manifest.trained_parallel()
    parallel = ParallelRecipe(tensor=tensor or (trained.tensor if trained else 1))
    with process_groups(parallel) as groups:
        yield load_model(checkpoint, manifest, groups, parallel=parallel, dtype=dtype), manifest, groups


def load_model(
    checkpoint: Path,
    manifest: CheckpointManifest,
    groups: ProcessGroups,
    *,
    parallel: ParallelRecipe | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> BlockDiffusionTransformer:
    """Return this rank's part of the model; see `open_model`. device: `local_device` if None.

    ValueError: the weights do not fit the manifest.
    """
    check_sizes(checkpoint, manifest)
    (model,) = build_model(
        manifest.model,
        manifest.vocabulary,
        groups,
        parallel=parallel or ParallelRecipe(),
        dtype=dtype or (torch.bfloat16 if manifest.precision == "bf16" else torch.float32),
        device=device or local_device(),
        seed=None,
    )
    load_weights(checkpoint, manifest, parameter_layouts([model]), alone=is_alone(groups))
    return model.eval()
