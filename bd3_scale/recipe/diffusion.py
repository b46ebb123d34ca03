"""Define the recipe section `diffusion`: the objective, its noise and its block sizes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bd3_scale.recipe.section import NonNegativeFloat, NonNegativeInt, PositiveInt, Section, Share, Unit


class BlockSizePhase(Section):
    """A phase of the block-size schedule: one block size for a number of steps."""

    block_size: Annotated[PositiveInt, Unit("tokens")] = Field(description="Tokens per block in this phase.")
    steps: Annotated[PositiveInt, Unit("steps")] = Field(description="Length of this phase.")


class DiffusionRecipe(Section):
    """The training objective: block diffusion (Arriola et al., ICLR 2025), or another one by name."""

    block_size: Annotated[PositiveInt, Unit("tokens")] = Field(
        description="Tokens per block, L' in the paper. 1 is autoregressive; data.seq_len is one block (MDLM)."
    )
    block_size_schedule: Annotated[tuple[BlockSizePhase, ...], Field(strict=False)] = Field(
        (), description="Phases with other block sizes, one after the other, before the steps with `block_size`."
    )
    block_size_choices: Annotated[tuple[PositiveInt, ...], Field(strict=False), Unit("tokens")] = Field(
        (),
        description="Block sizes from which each sequence draws its own, in the steps that would have `block_size`. "
        "Evaluations keep `block_size`.",
    )
    objective: str = Field(
        "block_diffusion",
        description="Training objective, a name in `registry.objectives`: block_diffusion, next_token, score_entropy, "
        "or one of a plug-in. `bd3_scale/objective/` has a file for each of the package.",
    )
    objective_options: dict[str, bool | int | float | str] = Field(
        {}, description="Options of a plug-in's objective, such as gamma: 2."
    )
    mask_rate_low: Annotated[Share, Unit("ratio")] = Field(
        0.0, description="Lower end of the clipped interval of mask rates in training, beta in the paper."
    )
    mask_rate_high: Annotated[Share, Unit("ratio")] = Field(
        1.0, description="Upper end of the clipped interval of mask rates in training, omega in the paper."
    )
    search_interval: bool = Field(
        False,
        description="Search the interval with the least variance of the loss at every evaluation, and train with it "
        "from then on.",
    )
    noise_schedule: str = Field(
        "linear",
        description="Mask rate p(t) as a function of the noise level t, a name in `registry.schedules`. Among the "
        "package's schedules only linear can be clipped to an interval.",
    )
    noise_steps: Annotated[PositiveInt | None, Unit("steps")] = Field(
        None, description="T of finite-time diffusion (absorbing D3PM). Default: continuous time."
    )
    loss_weights: Literal["nelbo", "unit_when_heavy"] = Field(
        "nelbo",
        description="Weight of a masked token's loss: nelbo is p'/p; unit_when_heavy is 1 where beta > 0.5, as the "
        "paper's code trains.",
    )
    clip_masked_share: bool = Field(
        False,
        description="Keep the masked share of each block within [beta, omega], too, where the block's length allows.",
    )
    noisy_copies: Annotated[Literal[1, 2], Unit("copies")] = Field(
        1,
        description="Noisy copies of a sequence that share one clean copy. Two copies are complementary where "
        "beta + omega = 1, and independent otherwise.",
    )
    mask_noise_std: Annotated[NonNegativeFloat, Unit("number")] = Field(
        0.0,
        description="Standard deviation of Gaussian noise on the embedding of masked tokens. It falls linearly to 0 "
        "over `mask_noise_steps`.",
    )
    mask_noise_steps: Annotated[NonNegativeInt, Unit("steps")] = Field(
        0, description="First steps of training that have noise on the embedding of masked tokens."
    )

    def block_sizes_at(self, step: int) -> tuple[int, ...]:
        """Return the block sizes of the step after `step` finished steps; each sequence takes one of them."""
        for phase in self.block_size_schedule:
            if step < phase.steps:
                return (phase.block_size,)
            step -= phase.steps
        return self.block_size_choices or (self.block_size,)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Return every block size of a training and its evaluations, once."""
        phases = (phase.block_size for phase in self.block_size_schedule)
        return tuple(dict.fromkeys((*phases, *self.block_size_choices, self.block_size)))

    def mask_noise_at(self, step: int) -> float:
        """Return the standard deviation of the noise on mask embeddings in the step after `step` finished steps."""
        return self.mask_noise_std * max(0.0, 1 - step / self.mask_noise_steps) if self.mask_noise_steps else 0.0
