"""Compute rows that pad a head up to a mask's id, for engines that include all rows in their softmax.

SGLang and LMDeploy take the mask at id 151669 (Qwen3's tokeniser), far behind a small vocabulary, so embedding and head
are padded by up to a hundred thousand rows. The head's padding rows must have a negligible share of the probability.

The inputs of a trained head lie on one side of the origin: there is a direction d with d·h ≈ 1 for every input h. A row
m − λd, with m the mean of the tokens' rows, has the logit m·h − λ d·h, which is low everywhere if λ is large enough. λ
is chosen so that `count` such rows together have the share SHARE on the inputs that d was fitted to, and the share is
measured on other inputs.
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

LENGTH, SEQUENCES, ROUNDS = 128, 32, 4  # of text that the model generates from random tokens
TOKENS = 1 << 14  # of the run's text, for the fit and for the measurement
SHARE = 1e-6  # most probability that all padding together may have on an input of the fit
LEAST = 0.1  # smallest d·h that is accepted; below it, inputs of another text might have d·h < 0
PIECE = 64  # rows whose logits are computed at once; a bound of memory
RIDGE, REFITS = 1e-3, 10  # the ridge is a share of the mean square


@dataclass(frozen=True)
class Padding:
    """The rows that pad a head, and their cost in engines that exclude no rows.

    Attributes:
        row: [X], the value of each row; None: each is the mean of the tokens' rows.
        summary: row and shares in words.
        median, largest: share of the probability of all padding rows, over masked tokens; None: not measured.
    """

    row: Tensor | None
    summary: str
    median: float | None = None
    largest: float | None = None


def with_padding(plan: ExportPlan, model: BlockDiffusionTransformer | None = None) -> ExportPlan:
    """Add measured padding rows to a plan that moves the mask; return any other plan unchanged.

    model: the model with the weights that are written, if it is loaded; else it is loaded in fp32 if memory suffices.
    """
    if not plan.moves_mask:
        return plan
    if model is not None:
        return replace(plan, padding=_measured(plan, model))
    try:
        plan.manifest.trained_objective()
    except ValueError as error:
        return replace(plan, padding=Padding(None, _mean_because(str(error))))
    needed, available = 4 * sum(tensor.numel for tensor in plan.tensors), available_bytes()
    if needed > available:
        reason = f"the model in fp32 takes {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are left"
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
        torch.cat([*_generated_text(plan, model, tokens, seed), *(_inputs(plan, model, batch)[0] for batch in batches)])
        for seed, batches in enumerate((trained, held_out))
    )
    others = others.to(rows.dtype).float()  # engines compute in the dtype of the weights
    direction = _direction(fitted.double()).float()
    row, lowest, kept = mean, float((fitted @ direction).min()), "the head's inputs have no common direction"
    if lowest >= LEAST:
        # λ = log(count / (size · SHARE)) / min d·h. By Jensen's inequality m·h ≤ log mean exp of the tokens' logits =
        # logsumexp − log(size); so the padding's share is at most count · exp(m·h − λ d·h − logsumexp) ≤ SHARE.
        row = (mean - (math.log(count / size) - math.log(SHARE)) / lowest * direction).to(rows.dtype).float()
        above = int((~(others @ row <= others @ mean)).sum())  # the negation counts NaN, too
        kept = f"other rows would have higher logits than the mean on {above:,} masked tokens" if above else ""
    shares = _shares(others, tokens, mean if kept else row, count)
    median, largest = float(shares.median()), float(shares.max())
    text = f"generated text alone, as no other was read ({unread})" if unread else "held-out and generated text"
    summary = (
        f"padding takes {median:.2g} of the probability in the median and {largest:.2g} at most, on {len(others):,} "
        f"masked tokens of {text}"
    )
    if kept:
        return Padding(None, f"{summary}: {_mean_because(kept)}", median, largest)
    return Padding(row.to(rows.dtype), summary, median, largest)


def _mean_because(reason: str) -> str:
    return (
        f"each padding row has the mean of the tokens' logits, since {reason}; the padding's share lowers all "
        "confidences, so set thresholds lower, and sample with a top-k"
    )


def _direction(hidden: Tensor) -> Tensor:
    """Return a direction [X] whose product with rows [M, X] is about 1, by ridge regression.

    The smallest product decides how far the padding rows must go, so after each fit rows with a small product get a
    larger weight, as in boosting.
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
    """Return the share [M] of the probability that `count` rows equal to `row` have next to those of `tokens` [V,
    X]."""
    totals = torch.cat([(part @ tokens.T).logsumexp(-1) for part in hidden.split(PIECE)])
    return torch.sigmoid(hidden @ row + math.log(count) - totals)


def _inputs(plan: ExportPlan, model: BlockDiffusionTransformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the head's inputs at masks of all rates in [0, 1], fp32 [M, X], and their row numbers."""
    batch = replace(batch, ids=batch.ids.clamp(min=0))  # sequences that only complete a batch have the id −1
    inputs = calibration_inputs(batch, plan.manifest.trained_objective(), next(model.parameters()).device)
    return model.head_inputs(inputs).float().cpu(), inputs.head_rows.cpu()


def _generated_text(plan: ExportPlan, model: BlockDiffusionTransformer, tokens: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield the head's inputs on random tokens that turn into generated text: each round draws the masked tokens.

    Half of the sequences begin with few tokens that repeat, and half consist of short documents: unusual inputs, for
    which the padding must be small, too.
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
    """Return batches of training and of held-out text of the run, or none of either and the reason."""
    manifest = plan.manifest
    if (data := manifest.trained_data()) is None:
        return [], [], "the training data are not known"
    if data.remotes:
        return [], [], f"it would have to be downloaded from {', '.join(data.remotes)}"
    sequences = max(1, TOKENS // data.seq_len)
    try:
        check_data(plan, data)
        trained = list(calibration_batches(data.as_mixed_before(manifest.step), sequences))
        options = {"batch_size": MICRO_BATCH, "dp_rank": 0, "dp_size": 1}
        parts = [
            held_out_batches(source, part, sequences=n, **options)
            for source, part, n in held_out_parts(data, sequences)
        ]
        return trained, [batch for part in parts for batch in part], None
    except (OSError, ValueError) as error:
        return [], [], in_one_line(error)
