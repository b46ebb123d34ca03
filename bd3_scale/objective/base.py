"""Define the abstract class of objectives; each objective is one further file.

An objective decides which noise is drawn, how text is corrupted, the loss of a row of the output head, how a model is
evaluated, and which formats it can be exported to. A launcher imports these files to check a recipe, so PyTorch is
imported inside the functions that make tensors.

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
# Export formats of models that fill masks.
BLOCK_DIFFUSION_FORMATS = frozenset({"sdar", "sdar_moe", "llada2", "bd3"})


@dataclass(frozen=True, eq=False)
class Draw:
    """One draw of an evaluation. The evaluated number is the sum of the losses of the head's rows times `weight`.

    Attributes:
        inputs: what the model computes on this rank.
        sequence, position: int64 [M], which token of the batch each row of the head predicts.
        weight: float32 [B, L], on the host; 0 where nothing is predicted.
        mask_rate: float32 [B, L], the rate with which a token was masked, for the search of the clipped interval; None
            for an objective without masks.
    """

    inputs: ModelInputs
    sequence: Tensor
    position: Tensor
    weight: Tensor
    mask_rate: Tensor | None = None


@dataclass(frozen=True)
class StepKeys:
    """The keys of the noise of an optimiser step; they are the same on every layout.

    Attributes:
        step: number of optimiser steps finished before this one.
        seed: of the run.
        global_batch_size: sequences of the step, over which noise levels may be stratified; None: no stratification
            over a global batch.
        intervals: the interval of mask rates that the search found for a block size, where it was searched.
    """

    step: int
    seed: int
    global_batch_size: int | None
    intervals: Mapping[int, Interval]


class Objective(ABC):
    """A training objective; `objectives.register("name")` gives a class its name in recipes.

    Attributes:
        fills_masks: whether a model of this objective fills the masks of a block. Only such a model can generate text
            here, and only its objective has block sizes and intervals of mask rates.
        predicts_first: whether the first token of a document is predicted, too, and counts in perplexity.
        options: what `diffusion.objective_options` of a recipe may set, with the defaults; `self.options` has the
            values.
        row_loss: the training loss of a row of the head. None: the negative log-likelihood of its target. Otherwise a
            function of (nll, log_total), both float32 [M] in nats, that PyTorch can differentiate: the negative
            log-likelihood of the target, and the log-sum-exp of all logits. These two suffice however the vocabulary
            is split over ranks: d loss / d logit_v = ∂/∂log_total · softmax_v + ∂/∂nll · (softmax_v − [v = target]).
        evaluation_loss: the same for evaluations. Its sum must be the negative log-likelihood or an upper bound of it.
            None: the negative log-likelihood, whatever the training loss is.
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
        """Yield a message for each value in a recipe that does not fit the objective: value, rule, way out."""
        for key, value in recipe.diffusion.objective_options.items():
            default = cls.options.get(key)
            if default is None:
                known = f"it takes {', '.join(cls.options)}" if cls.options else "it takes none"
                yield f"diffusion.objective_options.{key}: is not an option of {recipe.diffusion.objective}: {known}"
            elif type(value) is not type(default) and (type(value), type(default)) != (int, float):
                yield (
                    f"diffusion.objective_options.{key}: must be a value such as {default!r}, not {value!r} "
                    f"({recipe.diffusion.objective})"
                )

    @property
    def block_size(self) -> int:
        """Return the number of tokens of a block."""
        return self.diffusion.block_size

    def at(self, block_size: int) -> Self:
        """Return the same objective with another block size, for evaluations."""
        return type(self)(self.diffusion.model_copy(update={"block_size": block_size}), self.vocabulary)

    @property
    @abstractmethod
    def is_exact(self) -> bool:
        """Say whether an evaluation gives the likelihood itself, not a bound of it."""

    def num_draws(self, draws: int) -> int:
        """Return the number of draws that an evaluation uses when `draws` are requested; 1 where all would be equal."""
        return draws

    @abstractmethod
    def training_inputs(self, batch: Batch, keys: StepKeys, place: Placement) -> ModelInputs:
        """Return the model's inputs for a micro-batch of a step, on the device of `place`.

        Training asks for tensors on the host while the GPU computes the step before, and copies them later.
        """

    @abstractmethod
    def evaluation_draws(self, batch: Batch, draws: int, *, always: Tensor, place: Placement) -> list[Draw]:
        """Return `num_draws(draws)` draws of the noise of a batch.

        The noise is keyed by the ids of the sequences and not by the run's seed: runs with different seeds are
        compared under the same masks.

        always: bool [B, L], tokens that are always masked and do not count, such as a document's padding.
        """

    def counting(self, batch: Batch) -> Batch:
        """Return the batch with `counted` limited to the tokens that a model of this objective predicts."""
        if self.predicts_first:
            return batch
        import torch

        return replace(batch, counted=batch.counted & (torch.arange(batch.tokens.shape[1]) > batch.document_start))

    @classmethod
    def export_obstacle(cls, format_name: str) -> str | None:
        """Return why a model of this objective cannot be exported to a format, or None where it can.

        Rules about the shape of a model are in `convert`.
        """
        if format_name in BLOCK_DIFFUSION_FORMATS:
            return None
        return "a block diffusion model reads a [MASK] row at the position it predicts, at block_size 1 as well"


def objective_of(diffusion: DiffusionRecipe, vocabulary: Vocabulary) -> Objective:
    """Return the objective that `diffusion.objective` names. ValueError: no objective has that name."""
    make: Callable[[DiffusionRecipe, Vocabulary], Objective] = objectives.get(diffusion.objective)
    return make(diffusion, vocabulary)
