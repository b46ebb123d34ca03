"""From a dense checkpoint to a mixture of experts that computes the same at first.

Sparse upcycling (Komatsuzaki et al., 2023): every expert is a copy of the layer's MLP, and the weights of a row's
experts add up to 1, so that a layer gives what it gave, wherever rows are sent. Routers begin as in a model made
from nothing, at random: like rows go to the same experts, and from the first step on each learns of its own rows alone.
That is what makes experts part; where all rows went to all of them, they would stay copies for ever.
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
    """All that an upcycling will write. seed: of the routers; shapes, dtypes: of the dense tensors, by their keys."""

    checkpoint: Path
    manifest: CheckpointManifest
    moe: MoeRecipe
    seed: int
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]

    @property
    def model(self) -> ModelRecipe:
        """Return the mixture."""
        return self.manifest.model.model_copy(update={"moe": self.moe})

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors, but for the routers' few."""
        layers, dense = self.model.num_layers, self.model.dense_layers
        copies = (dense + (layers - dense) * self.moe.num_experts) / layers
        sizes = {key: torch.Size(shape).numel() * self.dtypes[key].itemsize for key, shape in self.shapes.items()}
        return int(sum(size * (copies if key.startswith(_MLP) else 1) for key, size in sizes.items()))


@reader("a checkpoint", path="checkpoint")
def plan_upcycle(
    checkpoint: Path, *, num_experts: int, top_k: int, dense_layers: int = 0, bias: bool = False, seed: int = 1
) -> UpcyclePlan:
    """Check a dense checkpoint and say which mixture it becomes.

    Args:
        num_experts, top_k: of a layer, and of a row.
        dense_layers: so many first layers stay dense.
        bias: experts have a bias for the choice, see `MoeRecipe`.
        seed: of the routers.

    Raises:
        ValueError: a damaged checkpoint, one that is a mixture already, whose MLP is no SwiGLU or has biases, or sizes
            that do not go together.
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
    """Write the checkpoint `out`, read it again and compare every value before it appears.

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
                    raise ValueError(f"{box.key} was not written as it was made: is the disk sound?")
                done += box.data.nbytes
                progress(min(done, total), total)


def _boxes(plan: UpcyclePlan, source: TensorReader) -> Iterator[Box]:
    """Yield the tensors of the mixture, those of layers one by one."""
    state, dense = plan.manifest.weights_state, plan.model.dense_layers
    for key, shape in plan.shapes.items():
        for place in range(shape[0]) if key.startswith("decoder.layers.") else [None]:
            offset = (place or 0, *(0,) * (len(shape) - 1))
            size = shape if place is None else (1, *shape[1:])
            values = source.read(f"{state}.{key}", offset, size)
            if place is None or not key.startswith(_MLP):
                yield Box(f"master.{key}", values, offset, shape)
            elif place < dense:
                yield Box(f"master.{key}", values, offset, (dense, *shape[1:]))
            else:
                yield from _copies(plan, key, place - dense, values)
    yield from _routers(plan)


def _copies(plan: UpcyclePlan, key: str, place: int, values: Tensor) -> Iterator[Box]:
    """Yield the experts of a layer, all of them `values`, a matrix of the dense MLP as [1, rows, columns]."""
    if key.endswith("linear_fc1.weight"):
        # Gate and up have an axis of their own there.
        values = values.unflatten(1, (2, -1))
    values, experts = values[None], plan.moe.num_experts
    name = key.replace(_MLP, f"{_MLP}experts.")
    whole = (plan.model.num_layers - plan.model.dense_layers, experts, *values.shape[2:])
    for expert in range(experts):
        yield Box(f"master.{name}", values, (place, expert, *(0,) * (len(whole) - 2)), whole)


def _routers(plan: UpcyclePlan) -> Iterator[Box]:
    model, moe = plan.model, plan.moe
    layers, key = model.num_layers - model.dense_layers, f"{_MLP}router.weight"
    whole = (layers, moe.num_experts, model.hidden_size)
    for place in range(layers):
        piece = Piece(key, 0, (1, *whole[1:]), (place, 0, 0), whole)
        drawn = initial_box(piece, model.num_layers, model.init_std, plan.seed)
        yield Box(f"master.{key}", drawn.to(plan.dtypes[f"{_MLP}linear_fc1.weight"]), piece.offset, whole)
    if moe.bias:
        bias = torch.zeros(layers, moe.num_experts)
        yield Box(f"master.{_MLP}router.expert_bias", bias, (0, 0), tuple(bias.shape))


def _write_companions(plan: UpcyclePlan, folder: Path) -> None:
    """Keep the tokeniser, and what an export writes of the model that the dense one came from."""
    if (plan.checkpoint / TOKENIZER).is_dir():
        shutil.copytree(plan.checkpoint / TOKENIZER, folder / TOKENIZER, ignore=shutil.ignore_patterns(".*"))
        keep_source_ids(source_ids(plan.checkpoint), folder / TOKENIZER)
    if (rows := file_in(plan.checkpoint / IMPORTED, MASK_ROWS)) is not None:
        (folder / IMPORTED).mkdir()
        shutil.copyfile(rows, folder / IMPORTED / MASK_ROWS)


def _manifest(plan: UpcyclePlan) -> CheckpointManifest:
    """Return what the dense manifest says of the model, and nothing of its run."""
    dense = plan.manifest
    kept = ("name", "vocabulary", "precision", "max_position_embeddings", "objective", "objective_options")
    return CheckpointManifest(
        **{field: getattr(dense, field) for field in (*kept, "block_size", "fills_masks")},
        step=0,
        model=plan.model,
        imported_from=f"dense checkpoint {dense.name}, step {dense.step}",
        states=("master",),
    )
