"""Define the recipe section `parallel`: how ranks divide the model, the sequence and the optimiser."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from bd3_scale.recipe.section import PositiveInt, Section, Unit


class ParallelRecipe(Section):
    """The division of model, sequence and optimiser among ranks. The ranks that remain are data-parallel."""

    tensor: Annotated[PositiveInt, Unit("ranks")] = Field(
        1, description="Ranks that divide the matrices of each layer."
    )
    sequence: bool = Field(
        False, description="Divide the rows between those matrices over the tensor-parallel ranks, too."
    )
    pipeline: Annotated[PositiveInt, Unit("stages")] = Field(1, description="Pipeline stages that divide the layers.")
    virtual_pipeline: Annotated[PositiveInt, Unit("chunks")] = Field(
        1, description="Chunks of layers on each stage. Above 1 the schedule is interleaved."
    )
    layers_per_chunk: Annotated[tuple[PositiveInt, ...], Field(strict=False), Unit("layers")] | None = Field(
        None, description="Layers of each chunk, in the order of the layers. Default: as even as possible."
    )
    context: Annotated[PositiveInt, Unit("ranks")] = Field(
        1, description="Ranks that divide the positions of a sequence."
    )
    expert: Annotated[PositiveInt, Unit("ranks")] = Field(
        1, description="Data- and context-parallel ranks that divide the experts. They add no ranks."
    )
    zero_stage: Annotated[Literal[0, 1, 2, 3], Unit("stage")] = Field(
        1,
        description="What data-parallel ranks divide (ZeRO). 0: nothing. 1: optimiser states. 2: also the reduced "
        "gradients. 3: also the weights. The gradients of micro-batches are summed up whole on every rank.",
    )
    offload_optimizer: bool = Field(False, description="Keep the optimiser states in host memory.")

    @property
    def model_size(self) -> int:
        """Return the number of ranks that together hold one replica of the model and one sequence."""
        return self.tensor * self.pipeline * self.context

    @property
    def fewest_ranks(self) -> int:
        """Return the least number of ranks for the layout: as many replicas as are needed to divide the experts."""
        return self.tensor * self.pipeline * math.lcm(self.context, self.expert)

    def chunks(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of each pipeline chunk in the order of the layers; chunk c is on stage c mod `pipeline`.

        Layers that do not divide evenly go to the middle: the first chunk has the embedding, the last one the head.
        """
        if self.layers_per_chunk is not None:
            return self.layers_per_chunk
        count = self.pipeline * self.virtual_pipeline
        few, more = divmod(num_layers, count)
        first = (count - more) // 2
        return tuple(few + (first <= chunk < first + more) for chunk in range(count))
