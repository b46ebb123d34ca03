"""Train block diffusion: predict the masked tokens of a block from its shown tokens and the clean blocks before it.

Source: BD3-LM (Arriola et al., ICLR 2025). The bound of one block is the integral over the noise level t of
−α'/(1 − α) times the negative log-likelihood of its masked tokens (equation 8; `bd3_scale.diffusion.schedule` has the
factor of every schedule). Training draws t so that mask rates lie in a clipped interval, which lowers the variance of
the gradient and gives no bound. An evaluation integrates over the whole of [0, 1], which gives the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bd3_scale.objective.base import Draw, Objective, StepKeys
from bd3_scale.registry import objectives

if TYPE_CHECKING:
    from torch import Tensor

    from bd3_scale.data.batch import Batch
    from bd3_scale.diffusion.interval import Interval
    from bd3_scale.diffusion.noise import Noise
    from bd3_scale.diffusion.schedule import Schedule
    from bd3_scale.model.rows import ModelInputs, Placement, RowLoss

# Evaluation noise does not depend on the run's seed, so that runs are compared under the same masks.
NOISE_SEED = 0


@objectives.register("block_diffusion")
class BlockDiffusion(Objective):
    """The cross-entropy of masked tokens, weighted so that its mean bounds the negative log-likelihood."""

    @property
    def is_exact(self) -> bool:
        """Say whether the block size is 1: each block then is one masked token, as in an autoregressive model."""
        return self.block_size == 1

    def num_draws(self, draws: int) -> int:
        return 1 if self.block_size == 1 else draws

    def training_schedule(self, interval: Interval | None = None) -> Schedule:
        """Return the schedule of training, with the searched `interval` or else the recipe's."""
        from bd3_scale.diffusion.schedule import Schedule

        diffusion = self.diffusion
        low, high = interval or (diffusion.mask_rate_low, diffusion.mask_rate_high)
        return Schedule(
            name=diffusion.noise_schedule,
            low=low,
            high=high,
            num_steps=diffusion.noise_steps,
            weights=diffusion.loss_weights,
            clip_masked_share=diffusion.clip_masked_share,
        )

    def training_inputs(self, batch: Batch, keys: StepKeys, place: Placement) -> ModelInputs:
        import torch

        from bd3_scale.attention.spans import make_spans
        from bd3_scale.diffusion.noise import draw_block_sizes
        from bd3_scale.objective.inputs import mask_noise

        diffusion = self.diffusion
        sizes = diffusion.block_sizes_at(keys.step)
        size_index = draw_block_sizes(choices=len(sizes), seed=keys.seed, **batch.noise_keys)
        block_size = sizes[0] if len(sizes) == 1 else torch.tensor(sizes)[size_index]
        spans = make_spans(batch.document_start, block_size)
        noises = self._training_noise(batch, keys, size_index, spans[1])
        inputs = self._inputs(batch, noises, block_size, self.row_loss, place, spans)
        if len(sizes) > 1:
            # A row of the head is copy and position times B plus the sequence, so that % B gives the sequence.
            row_groups = size_index.to(place.device, non_blocking=True)[inputs.head_rows % len(size_index)]
            inputs = replace(inputs, loss_groups=tuple(size_index.tolist()), row_loss_groups=row_groups)
        if std := diffusion.mask_noise_at(keys.step):
            copies = diffusion.noisy_copies
            noise = mask_noise(batch, std, copies=copies, seed=keys.seed, device=place.device, context=place.context)
            inputs = replace(inputs, mask_noise=noise)
        return inputs

    def evaluation_draws(self, batch: Batch, draws: int, *, always: Tensor, place: Placement) -> list[Draw]:
        count = self.num_draws(draws)
        noises = [self.evaluation_noise(batch, draw, count) for draw in range(count)]
        return [self.draw_of(batch, replace(noise, masked=noise.masked | always), place=place) for noise in noises]

    def evaluation_noise(self, batch: Batch, draw: int, draws: int) -> Noise:
        """Return noise with mask rates from U[0, 1]; at block size 1 every token is masked.

        At block size 1 the loss of a masked token does not depend on the mask rate, so masking all of them once gives
        the exact negative log-likelihood, where random masks would give the same mean with a variance.
        """
        from bd3_scale.attention.spans import make_spans
        from bd3_scale.diffusion.noise import draw_noise
        from bd3_scale.diffusion.schedule import Schedule

        return draw_noise(
            make_spans(batch.document_start, self.block_size)[1],
            seed=NOISE_SEED,
            epoch=0,
            sample_ids=batch.ids.clamp(min=0),
            schedule=Schedule(low=1.0 if self.block_size == 1 else 0.0),
            draw=draw,
            num_draws=draws,
            shown=batch.shown,
        )

    def draw_of(self, batch: Batch, noise: Noise, *, place: Placement) -> Draw:
        """Return the draw of an evaluation under the given noise."""
        from bd3_scale.diffusion.nelbo import loss_weight
        from bd3_scale.objective.inputs import masked_positions

        inputs = self._inputs(batch, [noise], self.block_size, self.evaluation_loss, place)
        rows = masked_positions(noise, place.context)
        return Draw(inputs, *rows, weight=loss_weight(noise), mask_rate=noise.mask_rate)

    def _inputs(
        self,
        batch: Batch,
        noises: Sequence[Noise],
        block_size: int | Tensor,
        row_loss: RowLoss | None,
        place: Placement,
        spans: Tensor | None = None,
    ) -> ModelInputs:
        from bd3_scale.objective.inputs import corrupt

        options: dict[str, Any] = {"mask_id": self.vocabulary.mask_id, "device": place.device, "context": place.context}
        return corrupt(batch, noises, block_size, row_loss=row_loss, spans=spans, **options)

    def _training_noise(self, batch: Batch, keys: StepKeys, size_index: Tensor, block_start: Tensor) -> list[Noise]:
        """Return the noise of every noisy copy; sequences of one block size are drawn together.

        Each block size has its own interval of mask rates, and so its own schedule.
        """
        import torch

        from bd3_scale.diffusion.noise import concatenate, draw_copies

        sizes = self.diffusion.block_sizes_at(keys.step)
        rows_of_size = [(size_index == index).nonzero()[:, 0] for index in range(len(sizes))]
        drawn = [
            draw_copies(
                block_start[rows],
                copies=self.diffusion.noisy_copies,
                schedule=self.training_schedule(keys.intervals.get(size)),
                seed=keys.seed,
                **{name: values[rows] for name, values in batch.noise_keys.items()},
                step=None if keys.global_batch_size is None else keys.step,
                slots=batch.slots[rows],
                shown=batch.shown[rows],
                global_batch_size=keys.global_batch_size,
            )
            for size, rows in zip(sizes, rows_of_size, strict=True)
            if len(rows)
        ]
        order = torch.cat(rows_of_size).argsort()
        return [concatenate(copies, order) for copies in zip(*drawn, strict=True)]
