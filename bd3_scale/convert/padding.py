"""Rows that pad a head up to a mask's id, for engines that take every row of it into their softmax.

What a trained head multiplies lies on one side of the origin: there is a direction whose product with it is about 1,
whatever the text. A row that goes far enough against that direction has a low logit everywhere, and a hundred thousand
of them together have no share of the probability that counts; it is measured on rows that the direction was not
fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bd3_scale.checkpoint.model import open_model
from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.convert.calibration import (
    MICRO_BATCH,
    calibration_batches,
    calibration_inputs,
    check_data,
    held_out_parts,
)
from bd3_scale.convert.names import HEAD
from bd3_scale.data.batch import Batch
from bd3_scale.data.stream import held_out_batches
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.observe.environment import available_bytes
from bd3_scale.resilience.readers import in_one_line

if TYPE_CHECKING:
    from bd3_scale.convert.export import ExportPlan

LENGTH, SEQUENCES, ROUNDS = 128, 32, 4  # of text that the model writes itself, from random tokens on
TOKENS = 1 << 14  # of the run's text, to fit to and to measure on
SHARE = 1e-6  # of the probability, which all that pads may have on any row of the fit
LEAST = 0.1  # product of the direction with such a row; below it, another text might have one below 0
PIECE = 64  # rows whose logits are held at once
RIDGE, REFITS = 1e-3, 10  # the ridge is that share of the mean square


@dataclass(frozen=True)
class Padding:
    """Say what the rows that pad a head are, and what they cost in an engine that leaves no row out.

    Attributes:
        row: [X], each of them, as it is written; None: each is the mean of the tokens' rows.
        says: of row and shares, for people.
        median, largest: share of the probability that they have together, over masked tokens; None: not measured.
    """

    row: Tensor | None
    says: str
    median: float | None = None
    largest: float | None = None


def with_padding(plan: ExportPlan, model: BlockDiffusionTransformer | None = None) -> ExportPlan:
    """Return a plan that moves the mask with the rows that pad its head, measured; any other as it is.

    model: with the weights that are written, where it is open; else it is opened in fp32 if memory suffices.
    """
    if not plan.moves_mask:
        return plan
    if model is not None:
        return replace(plan, padding=_measured(plan, model))
    try:
        plan.manifest.trained_objective()
    except ValueError as error:
        return replace(plan, padding=Padding(None, _mean_because(str(error))))
    needed, there = 4 * sum(tensor.numel for tensor in plan.tensors), available_bytes()
    if needed > there:
        reason = f"the model in fp32 takes {needed / 1e9:.1f} GB, and {there / 1e9:.1f} GB of memory are left"
        return replace(plan, padding=Padding(None, _mean_because(reason)))
    with open_model(plan.checkpoint, torch.float32) as (opened, _, _):
        return replace(plan, padding=_measured(plan, opened))


@torch.no_grad()
def _measured(plan: ExportPlan, model: BlockDiffusionTransformer) -> Padding:
    size = plan.manifest.vocabulary.size - 1
    with TensorReader(plan.checkpoint) as reader:
        rows = plan.read(reader, next(tensor for tensor in plan.tensors if tensor.name == HEAD))
    tokens, mean, count = rows[:size].float(), rows[size].float(), len(rows) - size
    trained, held_out, unread = _text(plan)
    fitted, others = (
        torch.cat([*_own_text(plan, model, tokens, seed), *(_inputs(plan, model, batch)[0] for batch in batches)])
        for seed, batches in enumerate((trained, held_out))
    )
    others = others.to(rows.dtype).float()  # an engine computes in the type of the weights
    direction = _direction(fitted.double()).float()
    row, lowest, kept = mean, float((fitted @ direction).min()), "what the head multiplies has no direction in common"
    if lowest >= LEAST:
        # The mean's logit is below the logarithm of the mean exponential (Jensen), so that SHARE holds on the fit.
        row = (mean - (math.log(count / size) - math.log(SHARE)) / lowest * direction).to(rows.dtype).float()
        above = int((~(others @ row <= others @ mean)).sum())  # counts what is no number, too
        kept = f"others had higher logits than that on {above:,} masked tokens" if above else ""
    shares = _shares(others, tokens, mean if kept else row, count)
    median, largest = float(shares.median()), float(shares.max())
    text = f"the model's own text alone, as no other was read ({unread})" if unread else "held-out and its own text"
    says = (
        f"padding takes {median:.2g} of the probability in the median and {largest:.2g} at most, on {len(others):,} "
        f"masked tokens of {text}"
    )
    if kept:
        return Padding(None, f"{says}: {_mean_because(kept)}", median, largest)
    return Padding(row.to(rows.dtype), says, median, largest)


def _mean_because(reason: str) -> str:
    return (
        f"each row of padding has the mean of the tokens' logits, since {reason}; confidences are lower by what all of "
        "them take, so set thresholds lower, and sample with a top-k"
    )


def _direction(hidden: Tensor) -> Tensor:
    """Return [X] whose product with rows [M, X] is about 1, by ridge regression; rows where it is low count more from
    fit to fit, so that the lowest is high.
    """
    weights = torch.ones(len(hidden), 1, dtype=hidden.dtype)
    for _ in range(1 + REFITS):
        weights = weights / weights.mean()
        squares = (weights * hidden).T @ hidden / len(hidden)
        squares.diagonal().add_(RIDGE * squares.diagonal().mean())
        direction = torch.linalg.solve(squares, (weights * hidden).mean(0))
        weights = weights * (1 - hidden @ direction[:, None]).exp()
    return direction


def _shares(hidden: Tensor, tokens: Tensor, row: Tensor, count: int) -> Tensor:
    """Return the share [M] that `count` rows like `row` have of the probability, beside those of tokens, [V, X]."""
    totals = torch.cat([(part @ tokens.T).logsumexp(-1) for part in hidden.split(PIECE)])
    return torch.sigmoid(hidden @ row + math.log(count) - totals)


def _inputs(plan: ExportPlan, model: BlockDiffusionTransformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return what the head multiplies at masks of all rates in [0, 1], fp32 [M, X], and which rows these are."""
    batch = replace(batch, ids=batch.ids.clamp(min=0))  # what fills a batch has no number
    inputs = calibration_inputs(batch, plan.manifest.trained_objective(), next(model.parameters()).device)
    return model.head_inputs(inputs).float().cpu(), inputs.head_rows.cpu()


def _own_text(plan: ExportPlan, model: BlockDiffusionTransformer, tokens: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield inputs of random tokens that become the model's own text: in each round it draws those that are masked.

    Half of the sequences begin with few tokens that repeat, and half are short documents.
    """
    block = plan.manifest.block_size
    shape = MICRO_BATCH, max(1, min(LENGTH, plan.manifest.max_position_embeddings) // block) * block
    places, every = torch.arange(shape[1]).expand(shape), torch.ones(shape, dtype=torch.bool)
    ids, generator = torch.arange(MICRO_BATCH), torch.Generator().manual_seed(seed)
    for start in range(0, SEQUENCES, MICRO_BATCH):
        kinds = torch.tensor([1, 8, len(tokens), len(tokens)])[:, None]
        some = torch.randint(len(tokens), (MICRO_BATCH, len(tokens)), generator=generator)
        text = some.gather(1, (torch.rand(shape, generator=generator) * kinds).long())
        starts = places // (2 * block) * (2 * block) if start % (2 * MICRO_BATCH) else torch.zeros_like(places)
        for turn in range(ROUNDS):
            keys = {"ids": ids + start, "slots": ids, "epochs": 0 * ids + turn, "source_keys": 0 * ids + seed}
            documents = {"document_start": starts.int(), "positions": places - starts}
            batch = Batch(**keys, **documents, tokens=text, counted=every, shown=~every)
            hidden, rows = _inputs(plan, model, batch)
            yield hidden
            likely = [(part @ tokens.T).softmax(-1) for part in hidden.split(PIECE)]
            drawn = torch.cat([part.multinomial(1, generator=generator)[:, 0] for part in likely])
            text = text.clone()
            text[rows % MICRO_BATCH, rows // MICRO_BATCH % shape[1]] = drawn


def _text(plan: ExportPlan) -> tuple[list[Batch], list[Batch], str | None]:
    """Return some training and held-out text of the run, or none of either and why."""
    manifest = plan.manifest
    if (data := manifest.trained_data()) is None:
        return [], [], "no data are known that it was trained on"
    if data.remotes:
        return [], [], f"it would be fetched from {', '.join(data.remotes)}"
    sequences = max(1, TOKENS // data.seq_len)
    try:
        check_data(plan, data)
        trained = list(calibration_batches(data.as_mixed_before(manifest.step), sequences))
        how = {"batch_size": MICRO_BATCH, "dp_rank": 0, "dp_size": 1}
        parts = [
            held_out_batches(source, part, sequences=n, **how) for source, part, n in held_out_parts(data, sequences)
        ]
        return trained, [batch for part in parts for batch in part], None
    except (OSError, ValueError) as error:
        return [], [], in_one_line(error)
