"""Report what a GGUF file costs: its size, and how far llama.cpp's results with it are from the model in fp32.

The NELBO of a weak model hardly changes under a coarse format. How often the most likely token stays the same, and the
divergence of the distributions, say more; they are measured at several mask rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from bd3_scale.attention.spans import make_spans
from bd3_scale.convert.calibration import held_out_parts
from bd3_scale.convert.quantize import Measured
from bd3_scale.data.batch import Batch
from bd3_scale.data.stream import held_out_batches
from bd3_scale.diffusion.nelbo import estimate_nelbo
from bd3_scale.diffusion.noise import draw_noise
from bd3_scale.diffusion.schedule import Schedule
from bd3_scale.evaluate.nelbo import HeldOut, evaluate_nelbo
from bd3_scale.generate.llama_model import LlamaModel
from bd3_scale.model.rows import ModelInputs
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.objective import Objective
from bd3_scale.objective.inputs import corrupt, masked_positions
from bd3_scale.parallel.groups import lone_groups
from bd3_scale.recipe.schema import DataRecipe

MASK_RATES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
RATE_SEQUENCES = 16  # sequences for the comparison of distributions, at each rate
ROWS = 256  # rows compared at once; a bound of memory
Progress = Callable[[int], object]


@dataclass(frozen=True)
class AtRate:
    """Results for tokens masked at one rate: the mean divergence KL(fp32 ‖ file) in nats, and the share of tokens whose
    most likely prediction is the same.
    """

    mask_rate: float
    tokens: int
    divergence: float
    same_token: float


@dataclass(frozen=True)
class GgufReport:
    """Size and accuracy of a file.

    Attributes:
        bytes_before, bytes_after: of the tensors in fp32, and in the file.
        calibration_sequences: for the importance matrix; 0: there is none.
        checked_texts: number of texts that have the same ids in llama.cpp as in training.
        rates: see `AtRate`; empty if nothing was measured.
        unchecked: why the logits of the file were not compared with the model's; None if they were.
        before, after: held-out NELBO of the model in fp32, and of the file; change: their difference on the same text
            with the same masks.
        seldom: weights that saw too few rows for the importance matrix and are rounded without it, and how many rows;
            see `weights_label`.
    """

    type: str
    architecture: str
    bytes_before: int
    bytes_after: int
    calibration_sequences: int
    checked_texts: int
    evaluation_sequences: int
    draws: int
    unchecked: str | None = None
    rates: tuple[AtRate, ...] = ()
    before: Measured | None = None
    after: Measured | None = None
    change: Measured | None = None
    seldom: Mapping[str, int] = field(default_factory=dict)


class HeldOutText:
    """Held-out sequences on which a model and its file are measured."""

    def __init__(self, data: DataRecipe, objective: Objective, sequences: int, draws: int) -> None:
        self._objective, self._draws = objective, draws
        self._parts = held_out_parts(data, sequences)
        self.sequences = sum(count for _, _, count in self._parts)
        self.rate_sequences = sum(min(RATE_SEQUENCES, count) for _, _, count in self._parts)

    @property
    def steps(self) -> int:
        """Return the number of sequences that both measurements report to `progress` in total."""
        return 2 * self.sequences + len(MASK_RATES) * self.rate_sequences

    def nelbo(
        self, native: BlockDiffusionTransformer, file: LlamaModel, progress: Progress
    ) -> tuple[Measured, Measured, Measured]:
        """Return the NELBO of both, and the change from `native` to `file`."""
        before, after = (self._held_out(model, progress) for model in (native, file))
        assert before.sums is not None
        assert after.sums is not None
        assert before.tokens is not None
        change = estimate_nelbo(after.sums - before.sums, before.tokens)
        return Measured.of(before.nelbo), Measured.of(after.nelbo), Measured.of(change)

    def _held_out(self, model: torch.nn.Module, progress: Progress) -> HeldOut:
        options = {"objective": self._objective, "draws": self._draws, "progress": progress}
        parts = [
            evaluate_nelbo([model], batches, lone_groups(), **options)  # type: ignore[list-item, arg-type]
            for batches in self._batches(16, self.sequences)
        ]
        return HeldOut.merged(parts)

    @torch.no_grad()
    def rates(self, native: BlockDiffusionTransformer, file: LlamaModel, progress: Progress) -> tuple[AtRate, ...]:
        """Compare the file's distributions with the model's at each of `MASK_RATES`."""
        return tuple(self._at(rate, native, file, progress) for rate in MASK_RATES)

    def _at(self, rate: float, native: BlockDiffusionTransformer, file: LlamaModel, progress: Progress) -> AtRate:
        tokens, divergence, same = 0, 0.0, 0
        for batch in chain.from_iterable(self._batches(1, RATE_SEQUENCES)):
            inputs, counts = self._inputs(batch, rate)
            expected = native.head_logits(inputs)[:, : file.vocabulary.size]
            for rows, logits in file.head_logits(inputs):
                kept = counts[rows]
                ours, theirs = expected[rows[kept]], logits[kept, : file.vocabulary.size]
                for own, other in zip(ours.split(ROWS), theirs.split(ROWS), strict=True):
                    divergence += float(divergences(own, other).sum())
                    same += int((own.argmax(-1) == other.argmax(-1)).sum())
                    tokens += len(own)
            progress(1)
        return AtRate(rate, tokens, divergence / max(1, tokens), same / max(1, tokens))

    def _inputs(self, batch: Batch, rate: float) -> tuple[ModelInputs, Tensor]:
        """Return the inputs of a batch masked at `rate`, and which rows of the head count."""
        block_size, vocabulary = self._objective.block_size, self._objective.vocabulary
        batch = self._objective.counting(batch)
        spans = make_spans(batch.document_start, block_size)
        schedule = Schedule(low=rate, high=rate)
        noise = draw_noise(spans[1], seed=0, epoch=0, sample_ids=batch.ids, schedule=schedule, shown=batch.shown)
        # Clean padding would tell the model where the document ends: it stays masked.
        noise = type(noise)(noise.masked | batch.padding, noise.mask_rate, noise.weight)
        inputs = corrupt(batch, [noise], block_size, mask_id=vocabulary.mask_id, device=torch.device("cpu"))
        return inputs, batch.counted[masked_positions(noise, (0, 1))]

    def _batches(self, size: int, most: int) -> Iterator[Iterator[Batch]]:
        """Yield the batches of each source, of at most `most` sequences of it."""
        for source, part, count in self._parts:
            yield held_out_batches(source, part, batch_size=size, dp_rank=0, dp_size=1, sequences=min(count, most))


def divergences(expected: Tensor, measured: Tensor) -> Tensor:
    """Return KL(p ‖ q) in nats of each row, float64 [M], from logits [M, V]; ids with −∞ in both contribute 0."""
    p, q = (logits.double().log_softmax(-1) for logits in (expected, measured))
    return torch.where(p.isfinite(), p.exp() * (p - q), 0.0).sum(-1)
