"""Train next-token prediction: the autoregressive baseline, in which no row is masked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bd3_scale.objective.base import BLOCK_DIFFUSION_FORMATS, Draw, Objective, StepKeys
from bd3_scale.recipe.schema import Recipe
from bd3_scale.registry import objectives

if TYPE_CHECKING:
    from torch import Tensor

    from bd3_scale.data.batch import Batch
    from bd3_scale.model.rows import ModelInputs, Placement


@objectives.register("next_token")
class NextToken(Objective):
    """The exact likelihood, left to right: each clean row sees the rows before it and predicts the next token."""

    fills_masks = False
    predicts_first = False

    @classmethod
    def problems(cls, recipe: Recipe) -> Iterator[str]:
        yield from super().problems(recipe)
        diffusion = recipe.diffusion
        fields = type(diffusion).model_fields
        # mask_noise_steps needs mask_noise_std, so naming the latter is enough.
        unused = fields.keys() - {"objective", "objective_options", "block_size", "mask_noise_steps"}
        changed = [key for key in fields if key in unused and getattr(diffusion, key) != fields[key].default]
        if changed or diffusion.block_size != 1:
            yield (
                f"diffusion.objective={diffusion.objective} masks nothing: set diffusion.block_size=1, and leave "
                f"{', '.join(changed) or 'the rest'} out"
            )

    @property
    def is_exact(self) -> bool:
        return True

    def num_draws(self, draws: int) -> int:
        return 1

    def training_inputs(self, batch: Batch, keys: StepKeys, place: Placement) -> ModelInputs:
        from bd3_scale.objective.inputs import next_tokens

        return next_tokens(batch, row_loss=self.row_loss, device=place.device, context=place.context)

    def evaluation_draws(self, batch: Batch, draws: int, *, always: Tensor, place: Placement) -> list[Draw]:
        import torch

        from bd3_scale.objective.inputs import next_token_positions, next_tokens

        inputs = next_tokens(batch, row_loss=self.evaluation_loss, device=place.device, context=place.context)
        return [Draw(inputs, *next_token_positions(batch, place.context), weight=torch.ones(batch.tokens.shape))]

    @classmethod
    def export_obstacle(cls, format_name: str) -> str | None:
        if format_name in BLOCK_DIFFUSION_FORMATS:
            return "it was trained to predict the next token; adapt it to block diffusion first"
        return None
