"""Collect the inputs of a model's linear layers under block diffusion, to calibrate a quantiser on them.

A calibration on plain text, as for autoregressive models, would contain no masked row. Here noise levels are drawn from
the whole of [0, 1], and noisy and clean rows pass through every layer as in training.
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

# The linear layers whose weights are quantised; the experts' are handled separately.
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
    """Rows of calibration sequences that are passed through a model layer by layer.

    Each layer is calibrated on the output of the layers before it with their current weights, quantised or not.

    Args:
        sequences: number of sequences from the training split of `data`; the held-out split is not used.
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
        """Return Σ x xᵀ over the input rows of each linear of `layer`, for experts one sum for each."""
        return self._sums(layer, HessianSum)

    def squares(self, layer: int) -> dict[str, list[SquareSum]]:
        """Return Σ x² over the input rows of each linear of `layer`, for experts one sum for each."""
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
                expert_sums = [
                    [kind(weight.shape[-1], weight.device) for _ in weight]
                    for weight in (part.linear_fc1.weight, part.linear_fc2.weight)
                ]
                sums |= zip((f"{name}.linear_fc1", f"{name}.linear_fc2"), expert_sums, strict=True)
                hooks.append(part.register_forward_pre_hook(_expert_adder(*expert_sums)))
        try:
            for hidden, rows in self._rows:
                module(hidden, None, rows)
        finally:
            for hook in hooks:
                hook.remove()
        return sums

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Pass the rows through `layer` with its current weights."""
        module = self._model.decoder.layers[layer]
        for index, (hidden, rows) in enumerate(self._rows):
            self._rows[index] = module(hidden, None, rows, add=True)[0], rows


def _adder(total: HessianSum | SquareSum) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        total.add(args[0].flatten(0, -2))

    return add


def _expert_adder(fc1_sums: list[S], fc2_sums: list[S]) -> Callable[[Experts, tuple[Tensor, ...]], None]:
    def add(experts: Experts, args: tuple[Tensor, ...]) -> None:
        x_MX, _, counts = args
        inner_MF = experts.inner(*args)
        for expert, rows in rows_of(counts, len(x_MX)):
            fc1_sums[expert].add(x_MX[rows])
            fc2_sums[expert].add(inner_MF[rows])

    return add


def weights_label(layer: int, expert: int | None) -> str:
    """Return the name in a report of the weights of a layer, or of one of its experts."""
    return f"layers.{layer}" + ("" if expert is None else f".experts.{expert}")


def check_data(plan: ExportPlan, data: DataRecipe) -> None:
    """Raise ValueError if `data` was prepared with another tokeniser, lacks a split, or has documents padded to a
    length that the model's blocks do not divide.
    """
    prepared = load_sources(data)
    check_tokenizer(prepared, load_tokenizer(plan.checkpoint / TOKENIZER))
    check_block_size(plan.manifest.block_size, data, prepared.document_multiple)
    if prepared.validation is None or prepared.train is None:
        paths = ", ".join(source.path for source in data.by_source.values())
        raise ValueError(
            f"{paths} needs training sequences to calibrate on and a held-out split to measure on: prepare it with "
            "--holdout"
        )


def held_out_parts(data: DataRecipe, sequences: int) -> list[tuple[DataRecipe, Manifest, int]]:
    """Return each source that has a held-out split, and how many of its first sequences to measure on, at most
    `sequences`.
    """
    prepared = load_sources(data)
    return [
        (source, part, min(sequences, part.validation.sequences))
        for name, source in data.by_source.items()
        if (part := prepared.part(name)).validation is not None
    ]


def calibration_batches(data: DataRecipe, sequences: int) -> Iterator[Batch]:
    """Return at least `sequences` training sequences, in an order that is shuffled with a fixed seed."""
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
    """Return the training inputs of a batch, with noise of a fixed seed."""
    keys = StepKeys(0, SEED, None, {objective.block_size: FULL})
    return objective.training_inputs(batch, keys, Placement(device))
