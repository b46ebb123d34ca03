"""Define the recipe sections of training: `optimizer`, `train`, `evaluation`, `checkpoint` and `guard`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bd3_scale.recipe.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Share, Unit

Recompute = Literal["none", "selective", "full"]
Decay = Annotated[float, Field(ge=0, lt=1), Unit("ratio")]


class ParameterGroup(Section):
    """Other values of the optimiser for the tensors whose names match a pattern."""

    match: str = Field(description="Pattern of tensor names, as checkpoints have them, such as *layernorm*.")
    lr_scale: Annotated[NonNegativeFloat | None, Unit("ratio")] = Field(
        None, description="Factor of the learning rate of these tensors. Default: 1."
    )
    weight_decay: Annotated[NonNegativeFloat | None, Unit("ratio")] = Field(
        None,
        description="Weight decay of these tensors. Default: that of the optimizer, and 0 for tensors of one "
        "dimension (norms and biases).",
    )

    @property
    def settings(self) -> dict[str, float]:
        """Return the values that the group sets."""
        return self.model_dump(include={"lr_scale", "weight_decay"}, exclude_none=True)


class OptimizerRecipe(Section):
    """The update of the weights and its learning rate, after the global gradient norm is clipped."""

    family: str = Field(
        "adamw", description="Optimiser, a name in `registry.optimizers`: adamw, lion, or one of a plug-in."
    )
    lr: Annotated[PositiveFloat, Unit("number")] = Field(
        3e-4, description="Learning rate after the warm-up, before the schedule lowers it."
    )
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = Field(
        (0.9, 0.95),
        description="Decay of Adam's first and second moment; of Lion's update and momentum, whose authors take "
        "0.9 and 0.99.",
    )
    eps: Annotated[PositiveFloat, Unit("number")] = Field(
        1e-8, description="Constant in the denominator of Adam's update, against a division by zero."
    )
    options: dict[str, bool | int | float | str] = Field({}, description="Options of a plug-in's optimiser.")
    weight_decay: Annotated[NonNegativeFloat, Unit("ratio")] = Field(
        0.1,
        description="Decoupled weight decay: a step takes lr times this share off a weight. Tensors of one dimension "
        "(norms and biases) have none.",
    )
    groups: Annotated[tuple[ParameterGroup, ...], Field(strict=False)] = Field(
        (),
        description="Other values for tensors by name. Where several groups match a tensor, a later one replaces the "
        "values of an earlier one.",
    )
    clip_grad_norm: Annotated[NonNegativeFloat, Unit("number")] = Field(
        1.0, description="Largest global L2 norm of the gradients; longer gradients are scaled down. 0: no clipping."
    )
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine",
        description="Learning rate after the warm-up: a cosine, constant with a decay at the end (warm-up, stable, "
        "decay), or constant.",
    )
    warmup_steps: Annotated[NonNegativeInt, Unit("steps")] = Field(
        0, description="First steps, in which the learning rate rises linearly from 0."
    )
    decay_steps: Annotated[NonNegativeInt | None, Unit("steps")] = Field(
        None, description="Last steps, in which the wsd schedule lowers the rate. Default: a fifth of train.steps."
    )
    min_lr_ratio: Annotated[Share, Unit("ratio")] = Field(
        0.1, description="Learning rate at the end, as a share of `lr`."
    )
    ema_decay: Decay = Field(
        0.0,
        description="Decay of a moving average of the weights, with which the model is evaluated and exported. "
        "0: no moving average is kept.",
    )


class ProfileRecipe(Section):
    """Steps that torch.profiler records, in RUN/profile."""

    steps: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False), Unit("steps")] = Field(
        description="First and last step of the profile, such as [10, 13]. Recorded steps are slower."
    )
    memory: bool = Field(
        False, description="Record allocations, too: on a GPU also a memory snapshot, on a CPU as events of the trace."
    )
    ranks: Annotated[tuple[NonNegativeInt, ...], Field(strict=False), Unit("ranks")] = Field(
        (0,), description="Ranks that write a profile."
    )


class TrainRecipe(Section):
    """The steps of a training, their batches, and how a step is computed."""

    steps: Annotated[PositiveInt, Unit("steps")] = Field(description="Optimiser steps of the whole training.")
    global_batch_size: Annotated[PositiveInt, Unit("sequences")] = Field(
        description="Sequences of an optimiser step, over all ranks."
    )
    micro_batch_size: Annotated[PositiveInt, Unit("sequences")] = Field(
        description="Sequences that a rank computes at a time. More need more memory and use the hardware better."
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Number format of the matrix products. auto: bf16 where the hardware computes it fast."
    )
    recompute: Recompute = Field(
        "none",
        description="Activations that backward computes again instead of keeping them. selective: those of attention, "
        "without its projections. full: those of whole layers.",
    )
    recompute_layers: Annotated[PositiveInt | None, Unit("layers")] = Field(
        None, description="With recompute: full, the first so many layers of every pipeline chunk. Default: all layers."
    )
    profile: ProfileRecipe | None = Field(None, description="Profile of some steps. Default: none is recorded.")


class EvaluationRecipe(Section):
    """Evaluations on held-out sequences during training."""

    every_steps: Annotated[NonNegativeInt, Unit("steps")] = Field(
        0, description="Steps from one evaluation to the next. 0: only at the end."
    )
    sequences: Annotated[PositiveInt, Unit("sequences")] = Field(
        64, description="Held-out sequences of an evaluation during training, at most."
    )
    draws: Annotated[PositiveInt, Unit("draws")] = Field(
        1, description="Draws of noise for each sequence. More draws give a smaller standard error."
    )
    prompts: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (),
        description="Prompts that every evaluation continues: the texts go to RUN/samples.jsonl, the console and the "
        "loggers.",
    )
    prompt_tokens: Annotated[PositiveInt, Unit("tokens")] = Field(
        64, description="Tokens that a prompt is continued by, at most."
    )


class CheckpointRecipe(Section):
    """Times at which checkpoints are written, checked and removed."""

    every_steps: Annotated[NonNegativeInt, Unit("steps")] = Field(
        0, description="Steps from one checkpoint to the next. 0: only at the end, and at SIGTERM or SIGUSR1."
    )
    keep_last: Annotated[PositiveInt, Unit("checkpoints")] = Field(2, description="Newest checkpoints that are kept.")
    keep_every_steps: Annotated[NonNegativeInt, Unit("steps")] = Field(
        0, description="Checkpoints at multiples of so many steps are kept, too. 0: none."
    )
    keep_best: Annotated[NonNegativeInt, Unit("checkpoints")] = Field(
        0, description="So many checkpoints with the lowest held-out NELBO are kept, too."
    )
    slow_seconds: Annotated[PositiveFloat, Unit("seconds")] = Field(
        300.0, description="A save that takes longer is reported while it goes on."
    )
    verify: Literal["full", "fast"] = Field(
        "full",
        description="Check of a checkpoint before a run resumes from it, and of a new one before older ones are "
        "removed. full: the hash of every file. fast: its size.",
    )


class GuardRecipe(Section):
    """Reaction to steps that go wrong."""

    skip_steps: Annotated[NonNegativeInt, Unit("steps")] = Field(
        3,
        description="Consecutive steps with gradients that are not finite whose update is skipped. One more ends the "
        "run.",
    )
    spike_deviations: Annotated[NonNegativeFloat, Unit("standard deviations")] = Field(
        10.0,
        description="A loss so far above the median of the last losses is recorded with its data. 0: none is recorded.",
    )
    replicas_every_steps: Annotated[NonNegativeInt, Unit("steps")] = Field(
        100, description="Steps between comparisons of the weights that several ranks hold. 0: never compared."
    )
