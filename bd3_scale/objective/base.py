"""What a model is trained for: one type, and one file for each objective.

An objective says what is drawn, how text is corrupted, what a row of the head loses, how a model is measured, and what
may be done with it afterwards. A launcher reads these files for the rules of a recipe, so that PyTorch is imported
where tensors are made.

Legend: B sequences, L data tokens a sequence, M rows of the head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from bd3_scale.recipe.schema import DiffusionRecipe, Recipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.registry import objectives

if TYPE_CHECKING:
    from torch import Tensor

    from bd3_scale.data.batch import Batch
    from bd3_scale.diffusion.interval import Interval
    from bd3_scale.model.rows import ModelInputs, Placement, RowLoss


Option = bool | int | float | str
# Names of the formats that models which fill masks are exported to.
BLOCK_DIFFUSION_FORMATS = frozenset({"sdar", "sdar_moe", "llada2", "bd3"})


@dataclass(frozen=True, eq=False)
class Draw:
    """One draw of an evaluation, of which the losses of the head's rows times `weight` add up to the measured number.

    Attributes:
        inputs: what the model computes on this rank.
        sequence, position: int64 [M], which token of the batch each row of the head predicts.
        weight: float32 [B, L], on the host; 0 where nothing is predicted.
        mask_rate: float32 [B, L], the rate that a token was masked with, which the search of the clipped interval
            needs; None for an objective without masks.
    """

    inputs: ModelInputs
    sequence: Tensor
    position: Tensor
    weight: Tensor
    mask_rate: Tensor | None = None


@dataclass(frozen=True)
class StepKeys:
    """What the noise of an optimiser step is drawn from, the same on every layout.

    Attributes:
        step: finished steps before it.
        seed: of the run.
        global_batch_size: sequences of the step, over which levels may be stratified; None: of a batch that is alone.
        intervals: the searched interval of mask rates of a block size, where there is one.
    """

    step: int
    seed: int
    global_batch_size: int | None
    intervals: Mapping[int, Interval]


class Objective(ABC):
    """What a model is trained for; `objectives.register("name")` gives a class its name in recipes.

    Attributes:
        fills_masks: a model of it fills the masks of a block: it writes text here, and has block sizes and intervals of
            mask rates.
        predicts_first: the first token of a document is predicted, too, and counts.
        options: what `diffusion.objective_options` of a recipe may set for it, with defaults; `self.options` has the
            values.
        row_loss: what a row of the head loses in training; None: the negative log-likelihood of its target. Else a
            function of (nll, log_total), both float32 [M] in nats, that PyTorch can differentiate: the negative
            log-likelihood, and the logarithm of the sum of the exponentials of all logits. Whatever splits the
            vocabulary over ranks, the gradient of each logit follows from the two derivatives.
        evaluation_loss: the same of an evaluation, whose sum is to be the likelihood or a bound of it: the negative
            log-likelihood, whatever was trained, unless the objective knows another.
    """

    fills_masks: bool = True
    predicts_first: bool = True
    options: Mapping[str, Option] = {}
    row_loss: RowLoss | None = None
    evaluation_loss: RowLoss | None = None

    def __init__(self, diffusion: DiffusionRecipe, vocabulary: Vocabulary) -> None:
        self.diffusion, self.vocabulary = diffusion, vocabulary
        self.options = {**type(self).options, **diffusion.objective_options}

    @classmethod
    def problems(cls, recipe: Recipe) -> Iterator[str]:
        """Yield what in a recipe does not suit the objective, each with its values and what to change."""
        for key, value in recipe.diffusion.objective_options.items():
            default = cls.options.get(key)
            if default is None:
                known = f"it takes {', '.join(cls.options)}" if cls.options else "it takes none"
                yield f"diffusion.objective_options.{key}: is no option of {recipe.diffusion.objective}: {known}"
            elif type(value) is not type(default) and (type(value), type(default)) != (int, float):
                yield (
                    f"diffusion.objective_options.{key}: must be a value such as {default!r}, not {value!r} "
                    f"({recipe.diffusion.objective})"
                )

    @property
    def block_size(self) -> int:
        """Return the tokens of a block."""
        return self.diffusion.block_size

    def at(self, block_size: int) -> Self:
        """Return the objective with another block size, which evaluations may take."""
        return type(self)(self.diffusion.model_copy(update={"block_size": block_size}), self.vocabulary)

    @property
    @abstractmethod
    def is_exact(self) -> bool:
        """Say whether an evaluation gives the likelihood, and no bound of it."""

    def num_draws(self, draws: int) -> int:
        """Return how many draws an evaluation takes that was asked for `draws`; 1 where all of them would be equal."""
        return draws

    @abstractmethod
    def training_inputs(self, batch: Batch, keys: StepKeys, place: Placement) -> ModelInputs:
        """Return what the model computes on a micro-batch of a step, at `place`: training asks for it on the host,
        while a GPU computes the step before, and sends it there.
        """

    @abstractmethod
    def evaluation_draws(self, batch: Batch, draws: int, *, always: Tensor, place: Placement) -> list[Draw]:
        """Return `num_draws(draws)` draws of the noise of a batch, keyed by its sequences' ids and no run's seed.

        always: bool [B, L], tokens that are never shown to the model and do not count, such as a document's padding.
        """

    def counting(self, batch: Batch) -> Batch:
        """Return the batch with those tokens counted that a model of this objective predicts."""
        if self.predicts_first:
            return batch
        import torch

        return replace(batch, counted=batch.counted & (torch.arange(batch.tokens.shape[1]) > batch.document_start))

    @classmethod
    def export_obstacle(cls, format_name: str) -> str | None:
        """Return why a model cannot be exported to a format, None where it can; rules of its shape aside."""
        if format_name in BLOCK_DIFFUSION_FORMATS:
            return None
        return "a block diffusion model reads a [MASK] row at the position it predicts, at block_size 1 as well"


def objective_of(diffusion: DiffusionRecipe, vocabulary: Vocabulary) -> Objective:
    """Return what `diffusion.objective` names. ValueError: no objective has that name."""
    make: Callable[[DiffusionRecipe, Vocabulary], Objective] = objectives.get(diffusion.objective)
    return make(diffusion, vocabulary)
