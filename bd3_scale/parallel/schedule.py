"""Run micro-batches through the pipeline's chunks, by megatron-core's schedules: none, 1F1B or interleaved.

1F1B is PipeDream's schedule, interleaved stages are those of Megatron-LM (Narayanan et al., SC 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bd3_scale.model import megatron_core  # noqa: F401

# isort: split
from megatron.core.pipeline_parallel import get_forward_backward_func

from bd3_scale.model.build import Chunks
from bd3_scale.model.rows import ModelInputs
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.parallel.groups import ProcessGroups


def forward_backward(
    chunks: Chunks, micro_batches: Sequence[ModelInputs], groups: ProcessGroups, scale: float, *, num_groups: int = 1
) -> Tensor:
    """Add to each weight's `grad` the gradient of `scale` times the sum of all micro-batches' losses.

    Returns the sum without `scale` for each loss group of sequences, float64 [num_groups]: this rank's part; zeros on
    every stage but the last.
    """
    # megatron's schedule divides each loss by the number of micro-batches and multiplies it by the number of
    # context-parallel ranks (`forward_step_calc_loss`); this undoes both.
    scale = scale * len(micro_batches) / groups.cp.size()

    def result(inputs: ModelInputs, total: Tensor, nll: Tensor) -> tuple[Tensor, Tensor]:
        # The clone is needed: megatron scales the loss in place, and the reported number would change with it.
        return total * scale, _by_group(inputs, total.detach().double().clone(), nll, num_groups)

    losses = _run(chunks, micro_batches, groups, result)
    return (
        torch.stack(losses).sum(0) if losses else torch.zeros(num_groups, dtype=torch.float64, device=_device(chunks))
    )


def _by_group(inputs: ModelInputs, total: Tensor, nll: Tensor, num_groups: int) -> Tensor:
    if inputs.row_loss_groups is None:
        return torch.cat([total[None], total.new_zeros(num_groups - 1)])
    return total.new_zeros(num_groups).index_add_(0, inputs.row_loss_groups, (nll * inputs.weights).double())


@torch.no_grad()
def token_losses(chunks: Chunks, micro_batches: Sequence[ModelInputs], groups: ProcessGroups) -> list[Tensor]:
    """Return the negative log-likelihoods [M], fp32, of each micro-batch; an empty list except on the last stage.

    All ranks of a pipeline must pass equally many micro-batches of one shape; with interleaved stages their number is a
    multiple of the number of stages.
    """
    if groups.pp.size() == 1:
        return [chunks[0](inputs)[1] for inputs in micro_batches]
    return _run(chunks, micro_batches, groups, lambda _, total, nll: (total, nll), forward_only=True)


def _run(
    chunks: Chunks,
    micro_batches: Sequence[ModelInputs],
    groups: ProcessGroups,
    result: Callable[[ModelInputs, Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    forward_only: bool = False,
) -> list[Tensor]:
    """Return the second value of `result` for each micro-batch, on the last stage."""
    first = micro_batches[0]
    rows = first.tokens.shape[1]
    assert all(inputs.tokens.shape == first.tokens.shape for inputs in micro_batches), "stages exchange equal shapes"

    def forward_step(batches: Iterator[ModelInputs], chunk: BlockDiffusionTransformer) -> tuple[Tensor, Any]:
        inputs = next(batches)
        output = chunk(inputs)
        if isinstance(output, Tensor):
            return output, None
        total, nll = output
        return total, lambda total: result(inputs, total, nll)

    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(micro_batches),
        # The length of whole sequences: megatron divides it by the context- and sequence-parallel ranks itself.
        seq_length=rows * groups.cp.size(),
        micro_batch_size=first.tokens.shape[0],
        forward_only=forward_only,
    )
    return list(results)


def _device(chunks: Chunks) -> torch.device:
    return next(chunks[0].parameters()).device
