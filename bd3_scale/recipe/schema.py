"""Define the recipe: everything that a person decides about a run, typed, frozen and validated.

Facts about the data (vocabulary, number of sequences) are in the data manifest. Facts about the machine (world size,
data-parallel size) come from the launcher. A recipe stores neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from bd3_scale.recipe.data import DATA_RETRY_MINUTES as DATA_RETRY_MINUTES
from bd3_scale.recipe.data import DataRecipe as DataRecipe
from bd3_scale.recipe.data import DataSource as DataSource
from bd3_scale.recipe.data import MixtureStage as MixtureStage
from bd3_scale.recipe.diffusion import BlockSizePhase as BlockSizePhase
from bd3_scale.recipe.diffusion import DiffusionRecipe as DiffusionRecipe
from bd3_scale.recipe.model import MOE_TRAINING as MOE_TRAINING
from bd3_scale.recipe.model import ModelRecipe as ModelRecipe
from bd3_scale.recipe.model import MoeRecipe as MoeRecipe
from bd3_scale.recipe.model import RopeScaling as RopeScaling
from bd3_scale.recipe.parallel import ParallelRecipe as ParallelRecipe
from bd3_scale.recipe.running import Deadlines as Deadlines
from bd3_scale.recipe.running import LaunchRecipe as LaunchRecipe
from bd3_scale.recipe.running import LoggingRecipe as LoggingRecipe
from bd3_scale.recipe.running import WandbRecipe as WandbRecipe
from bd3_scale.recipe.section import NAME as NAME
from bd3_scale.recipe.section import NonNegativeFloat as NonNegativeFloat
from bd3_scale.recipe.section import NonNegativeInt as NonNegativeInt
from bd3_scale.recipe.section import PositiveFloat as PositiveFloat
from bd3_scale.recipe.section import PositiveInt as PositiveInt
from bd3_scale.recipe.section import RecipeError as RecipeError
from bd3_scale.recipe.section import Section as Section
from bd3_scale.recipe.section import Share as Share
from bd3_scale.recipe.section import Unit as Unit
from bd3_scale.recipe.section import without_controls as without_controls
from bd3_scale.recipe.training import CheckpointRecipe as CheckpointRecipe
from bd3_scale.recipe.training import EvaluationRecipe as EvaluationRecipe
from bd3_scale.recipe.training import GuardRecipe as GuardRecipe
from bd3_scale.recipe.training import OptimizerRecipe as OptimizerRecipe
from bd3_scale.recipe.training import ParameterGroup as ParameterGroup
from bd3_scale.recipe.training import Recompute as Recompute
from bd3_scale.recipe.training import TrainRecipe as TrainRecipe
from bd3_scale.registry import MODULE_NAME


class Recipe(Section):
    """Everything that a person decides about a run."""

    name: str = Field(pattern=NAME, description="Name of the run.")
    deterministic: bool = Field(
        True,
        description="Use deterministic algorithms only: the same recipe on the same machine gives the same bits again.",
    )
    attention_backend: str = Field(
        "auto",
        description="Attention kernels, a name in `registry.attention_backends`. auto: the fastest that runs here. "
        "$BD3_SCALE_ATTENTION has precedence.",
    )
    model: ModelRecipe = Field(description="The transformer. `bd3-scale adapt` takes it from the model it adapts.")
    diffusion: DiffusionRecipe = Field(description="The training objective, its noise and its block sizes.")
    parallel: ParallelRecipe = Field(
        ParallelRecipe(), description="How ranks divide the model, the sequence and the optimiser."
    )
    plugins: Annotated[tuple[Annotated[str, Field(pattern=MODULE_NAME)], ...], Field(strict=False)] = Field(
        (), description="Python modules that register what the recipe names. Every rank imports them first."
    )
    run_dir: str | None = Field(None, description="Folder of everything that the run writes. Default: runs/<name>.")
    init_from: str | None = Field(
        None,
        description="Checkpoint or run directory with the weights that training begins with. The optimiser starts "
        "afresh.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63), Unit("number")] = Field(
        1, description="Seed of the initial weights, the order of the data and the noise."
    )
    data: DataRecipe = Field(description="The data sets, their sequences and their order.")
    optimizer: OptimizerRecipe = Field(OptimizerRecipe(), description="The update of the weights.")
    train: TrainRecipe = Field(description="The steps, their batches and their precision.")
    evaluation: EvaluationRecipe = Field(EvaluationRecipe(), description="Evaluations during training.")
    checkpoint: CheckpointRecipe = Field(
        CheckpointRecipe(), description="When checkpoints are written, checked and removed."
    )
    guard: GuardRecipe = Field(GuardRecipe(), description="What happens at steps that go wrong.")
    logging: LoggingRecipe = Field(LoggingRecipe(), description="The loggers.")
    launch: LaunchRecipe = Field(LaunchRecipe(), description="The processes of a run on one machine.")

    def evaluates_at(self, step: int) -> bool:
        """Return whether an evaluation is due between `step` finished steps and the next."""
        return bool(step and self.evaluation.every_steps) and step % self.evaluation.every_steps == 0

    @property
    def run_path(self) -> Path:
        """Return the folder of everything that the run writes."""
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def recomputation(self) -> tuple[Recompute, int | None]:
        """Return what is computed again in backward, and for how many layers of a chunk; see `TrainRecipe`."""
        return self.train.recompute, self.train.recompute_layers
