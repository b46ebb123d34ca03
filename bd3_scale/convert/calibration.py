"""What the linear layers of a model meet in block diffusion: the inputs that a quantiser is calibrated on.

A calibration on text alone, as for autoregressive models, would see no masked row; here noise levels are drawn from the
whole of [0, 1], and noisy and clean rows pass through every layer as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from bd3_scale.checkpoint.manifest import TOKENIZER
from bd3_scale.convert.quantizer import HessianSum, SquareSum
from bd3_scale.data.batch import Batch
from bd3_scale.data.manifest import Manifest, check_tokenizer, load_sources
from bd3_scale.data.stream import TrainingStream
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.diffusion.interval import FULL
from bd3_scale.model.experts import Experts, rows_of
from bd3_scale.model.rows import ModelInputs, Placement, RowContext
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.objective import Objective, StepKeys
from bd3_scale.recipe.checks import check_block_size
from bd3_scale.recipe.schema import DataRecipe

if TYPE_CHECKING:
    from bd3_scale.convert.export import ExportPlan

# The input of each of these, where a layer has it, is multiplied by weights that are quantised; so are rows of experts.
LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
)
SEED = 0
MICRO_BATCH = 4
S = TypeVar("S", HessianSum, SquareSum)


class Calibration:
    """Rows of calibration sequences on their way through a model, layer by layer, each with the layers before it as
    they are by then.

    Args:
        sequences: so many of the training split of `data`, whose held-out split stays unseen.
    """

    def __init__(
        self, model: BlockDiffusionTransformer, data: DataRecipe, objective: Objective, sequences: int
    ) -> None:
        self._model = model
        device = next(model.parameters()).device
        inputs = (calibration_inputs(batch, objective, device) for batch in calibration_batches(data, sequences))
        with torch.no_grad():
            self._rows: list[tuple[Tensor, RowContext]] = [model.embed(micro) for micro in inputs]

    def hessians(self, layer: int) -> dict[str, list[HessianSum]]:
        """Return Σ x xᵀ over the rows that each linear of `layer` multiplies: of that of experts one for each."""
        return self._sums(layer, HessianSum)

    def squares(self, layer: int) -> dict[str, list[SquareSum]]:
        """Return Σ x² over the rows that each linear of `layer` multiplies: of that of experts one for each."""
        return self._sums(layer, SquareSum)

    @torch.no_grad()
    def _sums(self, layer: int, kind: type[S]) -> dict[str, list[S]]:
        module = self._model.decoder.layers[layer]
        sums: dict[str, list[S]] = {}
        hooks = []
        for name, part in module.named_modules():
            if name in LINEARS:
                sums[name] = [kind(part.weight.shape[1], part.weight.device)]
                hooks.append(part.register_forward_pre_hook(_adder(sums[name][0])))
            elif isinstance(part, Experts):
                of_experts = [
                    [kind(weight.shape[-1], weight.device) for _ in weight]
                    for weight in (part.linear_fc1.weight, part.linear_fc2.weight)
                ]
                sums |= zip((f"{name}.linear_fc1", f"{name}.linear_fc2"), of_experts, strict=True)
                hooks.append(part.register_forward_pre_hook(_expert_adder(*of_experts)))
        try:
            for hidden, rows in self._rows:
                module(hidden, None, rows)
        finally:
            for hook in hooks:
                hook.remove()
        return sums

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Pass the rows through `layer`, with the weights that it has now."""
        module = self._model.decoder.layers[layer]
        for index, (hidden, rows) in enumerate(self._rows):
            self._rows[index] = module(hidden, None, rows, add=True)[0], rows


def _adder(total: HessianSum | SquareSum) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        total.add(args[0].flatten(0, -2))

    return add


def _expert_adder(of_fc1: list[S], of_fc2: list[S]) -> Callable[[Experts, tuple[Tensor, ...]], None]:
    def add(experts: Experts, args: tuple[Tensor, ...]) -> None:
        x_MX, _, counts = args
        inner_MF = experts.inner(*args)
        for expert, rows in rows_of(counts, len(x_MX)):
            of_fc1[expert].add(x_MX[rows])
            of_fc2[expert].add(inner_MF[rows])

    return add


def place_of(layer: int, expert: int | None) -> str:
    """Return how a report names the weights of a layer, or of one of its experts."""
    return f"layers.{layer}" + ("" if expert is None else f".experts.{expert}")


def check_data(plan: ExportPlan, data: DataRecipe) -> None:
    """Raise ValueError if `data` was prepared with another tokeniser, lacks a split, or has documents that do not
    divide into the model's blocks.
    """
    prepared = load_sources(data)
    check_tokenizer(prepared, load_tokenizer(plan.checkpoint / TOKENIZER))
    check_block_size(plan.manifest.block_size, data, prepared.document_multiple)
    if prepared.validation is None or prepared.train is None:
        paths = ", ".join(source.path for source in data.by_source.values())
        raise ValueError(
            f"{paths} needs sequences to calibrate on and a held-out split to measure on: prepare it with --holdout"
        )


def held_out_parts(data: DataRecipe, sequences: int) -> list[tuple[DataRecipe, Manifest, int]]:
    """Return each source that has a held-out split, and how many of its sequences to measure on: the first ones, at
    most so many, as in training.
    """
    prepared = load_sources(data)
    return [
        (source, part, min(sequences, part.validation.sequences))
        for name, source in data.by_source.items()
        if (part := prepared.part(name)).validation is not None
    ]


def calibration_batches(data: DataRecipe, sequences: int) -> Iterator[Batch]:
    """Return at least `sequences` training sequences, in a shuffled order that is always the same."""
    size = min(MICRO_BATCH, sequences)
    stream = TrainingStream(
        data.model_copy(update={"num_workers": 0}),
        load_sources(data),
        global_batch_size=size,
        dp_rank=0,
        dp_size=1,
        seed=SEED,
        step=0,
    )
    return islice(stream, -(-sequences // size))


def calibration_inputs(batch: Batch, objective: Objective, device: torch.device) -> ModelInputs:
    """Return what the model is trained on, of a batch; its noise is always the same."""
    keys = StepKeys(0, SEED, None, {objective.block_size: FULL})
    return objective.training_inputs(batch, keys, Placement(device))
