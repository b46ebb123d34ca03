"""Turn a dense checkpoint into a mixture of experts that computes the same at first.

Sparse upcycling (Komatsuzaki et al., ICLR 2023): every expert is a copy of the layer's MLP, and the weights of a row's
experts add up to 1, so a layer computes what it computed, wherever rows are sent. Routers are initialised at random, as
in
a new model: similar rows go to the same experts, and from the first step on each expert learns from its own rows. That
makes experts differ; if all rows went to all experts, they would remain copies for ever.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bd3_scale.checkpoint.boxes import Box, Shape
from bd3_scale.checkpoint.manifest import IMPORTED, TOKENIZER, CheckpointManifest, read_manifest, write_manifest
from bd3_scale.checkpoint.sizes import check_sizes
from bd3_scale.checkpoint.source_ids import keep_source_ids, source_ids
from bd3_scale.checkpoint.tensors import TensorReader, TensorWriter, same_bytes
from bd3_scale.convert.importer import MASK_ROWS
from bd3_scale.model.init import initial_box
from bd3_scale.model.layout import Piece
from bd3_scale.recipe.moe_rules import mixture_problems
from bd3_scale.recipe.schema import ModelRecipe, MoeRecipe
from bd3_scale.resilience.files import check_writable, new_folder
from bd3_scale.resilience.foreign import file_in
from bd3_scale.resilience.readers import reader

Progress = Callable[[int, int], object]
_MLP = "decoder.layers.mlp."


@dataclass(frozen=True)
class UpcyclePlan:
    """The plan of an upcycling. seed: of the routers; shapes, dtypes: of the dense tensors, by key."""

    checkpoint: Path
    manifest: CheckpointManifest
    moe: MoeRecipe
    seed: int
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]

    @property
    def model(self) -> ModelRecipe:
        """Return the shape of the mixture."""
        return self.manifest.model.model_copy(update={"moe": self.moe})

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors, except the routers, which are small."""
        layers, dense = self.model.num_layers, self.model.dense_layers
        copies = (dense + (layers - dense) * self.moe.num_experts) / layers
        sizes = {key: torch.Size(shape).numel() * self.dtypes[key].itemsize for key, shape in self.shapes.items()}
        return int(sum(size * (copies if key.startswith(_MLP) else 1) for key, size in sizes.items()))


@reader("a checkpoint", path="checkpoint")
def plan_upcycle(
    checkpoint: Path, *, num_experts: int, top_k: int, dense_layers: int = 0, bias: bool = False, seed: int = 1
) -> UpcyclePlan:
    """Check a dense checkpoint and decide which mixture it becomes.

    Args:
        num_experts: experts of a layer; top_k: experts per row.
        dense_layers: number of first layers that stay dense.
        bias: experts have a selection bias, see `MoeRecipe`.
        seed: of the routers.

    Raises:
        ValueError: a damaged checkpoint, one that is a mixture already, an MLP without SwiGLU or with biases, or sizes
            that contradict each other.
    """
    manifest = read_manifest(checkpoint)
    check_sizes(checkpoint, manifest)
    if manifest.model.moe is not None:
        raise ValueError(f"{checkpoint} has experts already: {manifest.model.moe.num_experts} in a layer")
    moe = MoeRecipe(
        num_experts=num_experts,
        top_k=top_k,
        ffn_hidden_size=manifest.model.ffn_hidden_size,
        first_dense_layers=dense_layers,
        bias=bias,
    )
    state = f"{manifest.weights_state}."
    with TensorReader(checkpoint) as opened:
        names = {name.removeprefix(state): name for name in opened.shapes if name.startswith(state)}
        shapes = {key: opened.shapes[name] for key, name in names.items()}
        dtypes = {key: opened.dtypes[name] for key, name in names.items()}
    plan = UpcyclePlan(checkpoint, manifest, moe, seed, shapes, dtypes)
    if problems := list(mixture_problems(plan.model)):
        raise ValueError(f"{checkpoint} cannot become this mixture: {'; '.join(problems)}")
    return plan


def run_upcycle(plan: UpcyclePlan, out: Path, progress: Progress = lambda done, total: None) -> None:
    """Write the checkpoint `out`; it is read again and every value compared before it appears.

    Raises:
        FileExistsError: `out` exists; OSError: it cannot be written; ValueError: what was written differs.
    """
    check_writable(out.parent, plan.num_bytes)
    total, done = 2 * plan.num_bytes, 0
    with new_folder(out) as folder, TensorReader(plan.checkpoint) as source:
        writer = TensorWriter(folder)
        for box in _boxes(plan, source):
            writer.add(box)
            done += box.data.nbytes
            progress(min(done, total), total)
        writer.finish()
        _write_companions(plan, folder)
        write_manifest(folder, _manifest(plan), writer.written)
        with TensorReader(folder) as written:
            for box in _boxes(plan, source):
                if not same_bytes(written.read(box.key, box.offset, tuple(box.data.shape)), box.data):
                    raise ValueError(f"{box.key} reads back differently than it was written: check the disk")
                done += box.data.nbytes
                progress(min(done, total), total)


def _boxes(plan: UpcyclePlan, source: TensorReader) -> Iterator[Box]:
    """Yield the tensors of the mixture; stacked tensors layer by layer."""
    state, dense = plan.manifest.weights_state, plan.model.dense_layers
    for key, shape in plan.shapes.items():
        for layer in range(shape[0]) if key.startswith("decoder.layers.") else [None]:
            offset = (layer or 0, *(0,) * (len(shape) - 1))
            size = shape if layer is None else (1, *shape[1:])
            values = source.read(f"{state}.{key}", offset, size)
            if layer is None or not key.startswith(_MLP):
                yield Box(f"master.{key}", values, offset, shape)
            elif layer < dense:
                yield Box(f"master.{key}", values, offset, (dense, *shape[1:]))
            else:
                yield from _copies(plan, key, layer - dense, values)
    yield from _routers(plan)


def _copies(plan: UpcyclePlan, key: str, layer: int, values: Tensor) -> Iterator[Box]:
    """Yield the experts of a layer, each equal to `values`, a matrix of the dense MLP as [1, rows, columns]."""
    if key.endswith("linear_fc1.weight"):
        # In a mixture gate and up projection have a separate axis.
        values = values.unflatten(1, (2, -1))
    values, experts = values[None], plan.moe.num_experts
    name = key.replace(_MLP, f"{_MLP}experts.")
    whole = (plan.model.num_layers - plan.model.dense_layers, experts, *values.shape[2:])
    for expert in range(experts):
        yield Box(f"master.{name}", values, (layer, expert, *(0,) * (len(whole) - 2)), whole)


def _routers(plan: UpcyclePlan) -> Iterator[Box]:
    model, moe = plan.model, plan.moe
    layers, key = model.num_layers - model.dense_layers, f"{_MLP}router.weight"
    whole = (layers, moe.num_experts, model.hidden_size)
    for layer in range(layers):
        piece = Piece(key, 0, (1, *whole[1:]), (layer, 0, 0), whole)
        drawn = initial_box(piece, model.num_layers, model.init_std, plan.seed)
        yield Box(f"master.{key}", drawn.to(plan.dtypes[f"{_MLP}linear_fc1.weight"]), piece.offset, whole)
    if moe.bias:
        bias = torch.zeros(layers, moe.num_experts)
        yield Box(f"master.{_MLP}router.expert_bias", bias, (0, 0), tuple(bias.shape))


def _write_companions(plan: UpcyclePlan, folder: Path) -> None:
    """Copy the tokeniser, the special ids, and the rows that an import's new mask replaced."""
    if (plan.checkpoint / TOKENIZER).is_dir():
        shutil.copytree(plan.checkpoint / TOKENIZER, folder / TOKENIZER, ignore=shutil.ignore_patterns(".*"))
        keep_source_ids(source_ids(plan.checkpoint), folder / TOKENIZER)
    if (rows := file_in(plan.checkpoint / IMPORTED, MASK_ROWS)) is not None:
        (folder / IMPORTED).mkdir()
        shutil.copyfile(rows, folder / IMPORTED / MASK_ROWS)


def _manifest(plan: UpcyclePlan) -> CheckpointManifest:
    """Return a manifest with the dense one's description of the model, and nothing about its run."""
    dense = plan.manifest
    kept = ("name", "vocabulary", "precision", "max_position_embeddings", "objective", "objective_options")
    return CheckpointManifest(
        **{field: getattr(dense, field) for field in (*kept, "block_size", "fills_masks")},
        step=0,
        model=plan.model,
        imported_from=f"dense checkpoint {dense.name}, step {dense.step}",
        states=("master",),
    )
