"""Define the recipe sections around training: `logging`, and `launch` with its deadlines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bd3_scale.recipe.data import DataRecipe
from bd3_scale.recipe.section import PositiveFloat, PositiveInt, Section, Unit


class WandbRecipe(Section):
    """Weights & Biases as a second place for the metrics."""

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="Where metrics go. auto: online with an API key, else offline."
    )
    project: str = Field("bd3_scale", description="Project of the run.")
    entity: str | None = Field(None, description="User or team of the run. Default: that of the API key.")


class LoggingRecipe(Section):
    """Logging of metrics: how often, and to which loggers."""

    every_steps: Annotated[PositiveInt, Unit("steps")] = Field(
        1, description="Steps from one record of the training metrics to the next."
    )
    wandb: WandbRecipe = Field(WandbRecipe(), description="Logging to Weights & Biases.")
    tensorboard: bool = Field(False, description="Write event files for TensorBoard to RUN/tensorboard.")
    loggers: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Further loggers, by their names in `registry.loggers`: those of a plug-in."
    )


class Deadlines(Section):
    """Time without progress, phase by phase, after which a rank counts as hung."""

    start: Annotated[PositiveFloat, Unit("seconds")] = Field(
        1800, description="Until the first step is done: imports, loading, tuning, compiling."
    )
    step: Annotated[PositiveFloat, Unit("seconds")] = Field(600, description="In a training step.")
    checkpoint: Annotated[PositiveFloat, Unit("seconds")] = Field(1800, description="In a save.")
    evaluation: Annotated[PositiveFloat, Unit("seconds")] = Field(3600, description="In an evaluation.")
    data: Annotated[PositiveFloat | None, Unit("seconds")] = Field(
        None,
        description="While a rank waits for its batch. Default: data.retry_minutes and 15 minutes more.",
    )

    def by_phase(self, data: DataRecipe) -> dict[str, float]:
        """Return the seconds of each phase of a run that reads `data`."""
        return self.model_dump() | {"data": self.data or 60 * (data.retry_minutes + 15)}


class LaunchRecipe(Section):
    """The processes of a run on one machine. Unused where a launcher (torchrun, SLURM) sets RANK and WORLD_SIZE."""

    processes: Annotated[PositiveInt | None, Unit("processes")] = Field(
        None,
        description="Processes to start. Default: one for each GPU of this machine; without a GPU, the fewest that "
        "the layout needs.",
    )
    threads: Annotated[PositiveInt | None, Unit("threads")] = Field(
        None, description="CPU threads of a process. Default: $OMP_NUM_THREADS, or cores / processes."
    )
    deadlines: Deadlines = Field(Deadlines(), description="Time without progress after which a rank counts as hung.")
