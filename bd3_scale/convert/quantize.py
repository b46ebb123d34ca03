"""Quantise weights: write a Hugging Face folder in the format of compressed-tensors, with a report of the loss."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bd3_scale.checkpoint.model import open_model
from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.convert.calibration import Calibration, check_data, held_out_parts, weights_label
from bd3_scale.convert.check_export import check_export, expected_logits, round_weights
from bd3_scale.convert.compressed import (
    engine_notes,
    packed_sizes,
    packed_tensors,
    quantization_config,
    unpacked_weight,
)
from bd3_scale.convert.export import ExportPlan, check_undamaged
from bd3_scale.convert.export_files import write_companions, write_shards
from bd3_scale.convert.folder import open_weights
from bd3_scale.convert.names import HEAD, NamedTensor
from bd3_scale.convert.padding import with_padding
from bd3_scale.convert.quantizer import HessianSum, Scheme, gptq, output_error, round_to_nearest
from bd3_scale.convert.serving import Packing
from bd3_scale.data.stream import held_out_batches
from bd3_scale.diffusion.nelbo import NelboEstimate
from bd3_scale.evaluate.nelbo import HeldOut, evaluate_nelbo
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.objective import Objective
from bd3_scale.parallel.groups import ProcessGroups
from bd3_scale.recipe.schema import DataRecipe
from bd3_scale.resilience.files import check_writable, new_folder

Method = Literal["rtn", "gptq"]
Progress = Callable[[int, int], object]
REPORT = "quantization_report.json"
# The native linear layers whose weights are quantised.
_LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Measured:
    """Held-out NELBO in nats a token, and its standard errors."""

    nelbo: float
    noise_standard_error: float | None
    text_standard_error: float | None

    @classmethod
    def of(cls, estimate: NelboEstimate) -> Measured:
        """Return the part of an estimate that a report keeps."""
        return cls(estimate.nelbo, estimate.noise_standard_error, estimate.text_standard_error)


@dataclass(frozen=True)
class QuantizationReport:
    """Size and accuracy of quantised weights.

    Attributes:
        errors: for each weight, ‖(W − Ŵ)X‖² / ‖WX‖² on the calibration inputs X.
        before: NELBO with the weights in `dtype`; after: with the quantised ones.
        notes: why engines' kernels cannot run it, see `kernel_notes`.
        padding: see `Padding.summary`; None: no mask was moved.
        seldom: weights that saw too few rows for GPTQ and are rounded to nearest, and how many rows; see
            `weights_label`.
    """

    bits: int
    group_size: int
    method: Method
    dtype: str
    bytes_before: int
    bytes_after: int
    calibration_sequences: int
    evaluation_sequences: int
    errors: Mapping[str, float]
    before: Measured
    after: Measured
    notes: tuple[str, ...]
    padding: str | None = None
    seldom: Mapping[str, int] = field(default_factory=dict)


def check_quantizable(plan: ExportPlan, scheme: Scheme) -> None:
    """Raise ValueError if a weight's input features do not divide into groups, or a group does not fill whole words."""
    each = 32 // scheme.bits
    if scheme.group_size % each:
        raise ValueError(
            f"group_size={scheme.group_size} does not fill whole words of {each} values: use a multiple of {each}"
        )
    bad = {t.shape[1]: t.name for t in plan.tensors if is_quantized(t) and t.shape[1] % scheme.group_size}
    if bad:
        named = "; ".join(f"{name} has {features}" for features, name in bad.items())
        raise ValueError(
            f"input features must divide into groups of {scheme.group_size}: {named}; use a --group-size that divides "
            "them, or train a model whose hidden and feed-forward sizes are multiples of 128"
        )


def kernel_notes(plan: ExportPlan, scheme: Scheme) -> tuple[str, ...]:
    """Return why engines' kernels cannot run the layers as engines join them on one rank; empty if they can."""
    model = plan.manifest.model
    heads, hidden = model.num_attention_heads * model.head_size, model.hidden_size
    joined = {
        "query/key/value": (heads + 2 * model.query_groups * model.head_size, hidden),
        "attention output": (hidden, heads),
    }
    widths = {"": model.ffn_hidden_size if model.dense_layers else 0}
    if model.moe is not None:
        widths |= {"an expert's ": model.moe.ffn_hidden_size, "the shared expert's ": model.moe.shared_ffn_hidden_size}
    for whose, width in widths.items():
        if width:
            joined[f"{whose}gate/up"] = (2 * width if model.activation == "swiglu" else width, hidden)
            joined[f"{whose}down"] = (hidden, width)
    return tuple(f"{name}: {note}" for name, shape in joined.items() for note in engine_notes(shape, scheme))


def packing_of(plan: ExportPlan, scheme: Scheme, method: Method) -> Packing:
    """Return the description of the weights for the model card and the table of engines."""
    description = f"int{scheme.bits} in groups of {scheme.group_size} ({method}), compressed-tensors"
    return Packing(description, kernel_notes(plan, scheme))


def is_quantized(tensor: NamedTensor) -> bool:
    """Tell whether a tensor is quantised: projections of layers are; embedding, norms, biases, routers, head are
    not."""
    module, _, part = tensor.key.rpartition(".")
    return part == "weight" and module.endswith(_LINEARS)


def _ignored(plan: ExportPlan) -> list[str]:
    """Return the linear layers that are not quantised, for `ignore` of the configuration."""
    return ["lm_head", *(["re:.*mlp.gate$"] if plan.manifest.model.moe is not None else [])]


def run_quantize(
    plan: ExportPlan,
    out: Path,
    scheme: Scheme,
    method: Method,
    data: DataRecipe,
    *,
    calibration_sequences: int,
    evaluation_sequences: int,
    draws: int,
    progress: Progress = lambda done, total: None,
) -> QuantizationReport:
    """Quantise layer by layer, write the folder `out`, read it again and compare, and measure the loss.

    Raises:
        ValueError: weights that do not divide into groups, or a tensor that reads back differently; FileExistsError:
            `out` exists.
    """
    check_quantizable(plan, scheme)
    check_data(plan, data)
    check_undamaged(plan)
    check_writable(out.parent, plan.num_bytes)
    # With experts only the weights are rounded, and activations stay in fp32: rounding them would choose other experts.
    exact = plan.manifest.model.moe is not None
    opened = open_model(plan.checkpoint, torch.float32 if exact else None)
    with new_folder(out) as folder, opened as (model, manifest, groups):
        objective = manifest.trained_objective()
        measure = _Measure(model, groups, data, objective, evaluation_sequences, draws)
        done, total = 0, 2 * measure.sequences + len(plan.tensors)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        measure.progress = advance
        quantizer = _Quantizer(plan, model, scheme, method, advance)
        assert plan.dtype is not None, "a quantised export has a dtype, for its scales"
        round_weights(model, plan.dtype)
        before = measure()
        calibration = Calibration(model, data.as_mixed_before(manifest.step), objective, calibration_sequences)
        sizes = {name: size for t in plan.tensors for name, size in quantizer.sizes(t).items()}
        with TensorReader(plan.checkpoint) as reader:
            write_shards(folder, quantizer.tensors(reader, calibration), sizes)
        config = {"quantization_config": quantization_config(scheme, _ignored(plan))}
        write_companions(folder, quantizer.plan, config, packing_of(plan, scheme, method))
        padding = quantizer.plan.padding
        quantizer.verify(folder)
        ids, logits = expected_logits(model, manifest.block_size, manifest.max_position_embeddings)
        check_export(folder, plan.tokenizer(), plan.manifest.vocabulary, ids, logits, plan.dtype, exact=exact)
        report = QuantizationReport(
            bits=scheme.bits,
            group_size=scheme.group_size,
            method=method,
            dtype=str(plan.dtype).removeprefix("torch."),
            bytes_before=plan.num_bytes,
            bytes_after=sum(sizes.values()),
            calibration_sequences=calibration_sequences,
            evaluation_sequences=measure.sequences,
            errors=quantizer.errors,
            before=before,
            after=measure(),
            notes=kernel_notes(plan, scheme),
            padding=padding.summary if padding else None,
            seldom=quantizer.seldom,
        )
        (folder / REPORT).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    return report


class _Measure:
    """Measures the held-out NELBO of the model's current weights, always on the same sequences with the same masks."""

    def __init__(
        self,
        model: BlockDiffusionTransformer,
        groups: ProcessGroups,
        data: DataRecipe,
        objective: Objective,
        sequences: int,
        draws: int,
    ) -> None:
        self._model, self._groups, self._objective, self._draws = model, groups, objective, draws
        self._parts = held_out_parts(data, sequences)
        self.sequences = sum(count for _, _, count in self._parts)
        self.progress: Callable[[int], object] = lambda sequences: None

    def __call__(self) -> Measured:
        options: dict[str, Any] = {"objective": self._objective, "draws": self._draws, "progress": self.progress}
        parts = []
        for source, part, count in self._parts:
            batches = held_out_batches(source, part, batch_size=16, dp_rank=0, dp_size=1, sequences=count)
            parts.append(evaluate_nelbo([self._model], batches, self._groups, **options))
        return Measured.of(HeldOut.merged(parts).nelbo)


class _Quantizer:
    """Quantises the model's weights in place and yields the tensors to write, in the order of the export."""

    def __init__(
        self,
        plan: ExportPlan,
        model: BlockDiffusionTransformer,
        scheme: Scheme,
        method: Method,
        progress: Callable[[int], object],
    ) -> None:
        self.plan, self._model, self._scheme, self._method, self._progress = plan, model, scheme, method, progress
        assert plan.dtype is not None
        self._dtype = plan.dtype
        self._parameters = dict(model.named_parameters())
        self.errors: dict[str, float] = {}
        self.seldom: dict[str, int] = {}

    def sizes(self, tensor: NamedTensor) -> dict[str, int]:
        """Return the bytes of each tensor that is written for a tensor of the model, by name."""
        if not is_quantized(tensor):
            return {tensor.name: tensor.numel * self._dtype.itemsize}
        groups = tensor.numel // self._scheme.group_size
        return packed_sizes(
            tensor.name.removesuffix(".weight"), tensor.numel * self._scheme.bits // 8, groups * self._dtype.itemsize
        )

    def tensors(self, reader: TensorReader, calibration: Calibration) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors to write.

        A layer is calibrated when its first weight is reached, on the outputs of layers that are already quantised: its
        weights can then make up for errors of the layers before.
        """
        layer, hessians = None, {}
        for tensor in self.plan.tensors:
            self._progress(1)
            if not is_quantized(tensor):
                if tensor.name == HEAD:  # it follows the layers, which are quantised now
                    self.plan = with_padding(self.plan, self._model)
                yield tensor.name, self.plan.read(reader, tensor)
                continue
            assert tensor.layer is not None
            if tensor.layer != layer:
                if layer is not None:
                    calibration.advance(layer)
                layer = tensor.layer
                hessians = calibration.hessians(layer)
            linear = tensor.key.removeprefix("decoder.layers.").removesuffix(".weight")
            expert = tensor.expert
            total = hessians[linear][expert or 0]
            if self._method == "gptq" and not total.is_enough:
                self.seldom[weights_label(layer, expert)] = total.rows
            yield from self._quantize(tensor, total).items()

    @torch.no_grad()
    def _quantize(self, tensor: NamedTensor, total: HessianSum) -> dict[str, Tensor]:
        weight = tensor.join([self._box(tensor, *box) for box in tensor.boxes]).float()
        if self._method == "gptq" and total.is_enough:
            quantized = gptq(weight, total.hessian, self._scheme, self._dtype)
        else:
            quantized = round_to_nearest(weight, self._scheme, self._dtype)
        self.errors[tensor.name] = output_error(weight, quantized, total.hessian)
        values = quantized.dequantize()
        for (offset, _), data in zip(tensor.boxes, (part for _, part in tensor.split(values)), strict=True):
            part = self._box(tensor, offset, tuple(data.shape))
            part.copy_(data.view(part.shape))
        return packed_tensors(tensor.name.removesuffix(".weight"), quantized, self._scheme)

    def _box(self, tensor: NamedTensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Return the part of a layer's parameter that corresponds to a box of the stacked tensor."""
        name = tensor.key.replace("decoder.layers.", f"decoder.layers.{tensor.layer}.")
        part = tuple(slice(first, first + size) for first, size in zip(offset[1:], shape[1:], strict=True))
        return self._parameters[name].data[part]

    def verify(self, folder: Path) -> None:
        """Unpack the written weights and compare them with those that were measured."""
        written = open_weights(folder, quantised=True)
        for tensor in self.plan.tensors:
            if is_quantized(tensor):
                name = tensor.name.removesuffix(".weight")
                unpacked = unpacked_weight({n: written.read(n) for n in self.sizes(tensor)}, name, self._scheme)
                expected = tensor.join([self._box(tensor, *box) for box in tensor.boxes])
                if not torch.equal(unpacked.to(expected.dtype), expected.cpu()):
                    raise ValueError(f"{name} reads back differently than it was quantised: check the disk")
