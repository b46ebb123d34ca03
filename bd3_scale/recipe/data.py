"""Define the recipe section `data`: one data set, or several that are mixed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bd3_scale.recipe.section import NAME, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Unit

DATA_RETRY_MINUTES = 30.0


class DataSource(Section):
    """One of several data sets that batches mix."""

    name: str = Field(
        pattern=NAME,
        description="Name of the source. The order and the noise of its sequences depend on it: keep it for the whole "
        "run.",
    )
    path: str = Field(description="Like data.path, for this source.")
    remote: str | None = Field(None, description="Like data.remote, for this source.")
    weight: Annotated[PositiveFloat | None, Unit("ratio")] = Field(
        None, description="Share of the sequences, relative to the other sources. Leave it out with data.stages."
    )
    max_epochs: Annotated[PositiveFloat | None, Unit("epochs")] = Field(
        None, description="A run that would read the sequences of this source more often ends with an error."
    )


class MixtureStage(Section):
    """Weights of the sources in a range of steps."""

    until: Annotated[PositiveInt | None, Unit("steps")] = Field(
        None, description="Last step of this stage. Leave it out in the last stage."
    )
    weights: Annotated[dict[str, PositiveFloat], Unit("ratio")] = Field(
        description="Weight of each source by its name, relative to each other. Sources without one are not read."
    )


class DataRecipe(Section):
    """Sharded token sequences, as `bd3-scale data prepare` writes them: one data set, or a mixture of several."""

    path: str = Field("", description="Folder of the shards; with `remote`, folder of the cache on each node.")
    sources: Annotated[tuple[DataSource, ...], Field(strict=False)] = Field(
        (), description="Data sets of one tokeniser to mix, in place of `path` and `remote`."
    )
    stages: Annotated[tuple[MixtureStage, ...], Field(strict=False)] = Field(
        (), description="Weights of the sources, stage by stage. Default: each source's own weight in all steps."
    )
    remote: str | None = Field(
        None, description="Folder or object store (s3://…) from which MosaicML streaming downloads the shards."
    )
    cache_limit: str | None = Field(
        None,
        pattern=r"(?i)^\d+(\.\d+)?[kmgt]b$",
        description="Largest size of the cache on a node, such as 100gb; with `sources`, of the cache of each source. "
        "Needs `remote`.",
    )
    retry_minutes: Annotated[NonNegativeFloat, Unit("minutes")] = Field(
        DATA_RETRY_MINUTES,
        description="How long a `remote` that does not answer is asked again, before the run ends.",
    )
    seq_len: Annotated[PositiveInt, Unit("tokens")] = Field(
        description="Data tokens of a sequence, L in the paper. It must equal the prepared length."
    )
    isolate_documents: bool = Field(
        True, description="Documents that are packed into one sequence do not attend to each other."
    )
    shuffle: bool = Field(True, description="Read the sequences in an order that depends on the seed and the epoch.")
    shuffle_window: Annotated[PositiveInt | None, Unit("sequences")] = Field(
        None,
        description="Sequences that are shuffled among each other at a time, over all machines. The larger, the more "
        "remote data each machine caches. Default: what fits into cache_limit on one machine, 65536 to 1048576.",
    )
    num_workers: Annotated[NonNegativeInt, Unit("processes")] = Field(
        1, description="Loader processes of a rank; in a pipeline, of a rank of the first stage."
    )

    @property
    def by_source(self) -> dict[str, DataRecipe]:
        """Return the section of each source as if it were the only one, by its name; "" without `sources`."""
        single = {"sources": (), "stages": ()}
        named = {s.name: self.model_copy(update={**single, "path": s.path, "remote": s.remote}) for s in self.sources}
        return named or {"": self}

    @property
    def remotes(self) -> list[str]:
        """Return the remotes that machines fetch data from."""
        return [source.remote for source in self.by_source.values() if source.remote is not None]

    @property
    def folders(self) -> list[str]:
        """Return the folders of the data that machines read in place, without a remote."""
        return [source.path for source in self.by_source.values() if source.remote is None]

    @property
    def first_source(self) -> DataRecipe:
        """Return the section of the first source as if it were the only one; all sources have one tokeniser."""
        return next(iter(self.by_source.values()))

    @property
    def mixture(self) -> tuple[MixtureStage, ...]:
        """Return the weights of the sources, stage by stage; empty without sources."""
        weights = {source.name: source.weight for source in self.sources if source.weight is not None}
        return self.stages or ((MixtureStage(weights=weights),) if weights else ())

    def mixed_before(self, step: int) -> tuple[MixtureStage, ...]:
        """Return the stages of the first `step` steps, the last one ending there; empty without sources."""
        stages: list[MixtureStage] = []
        for stage in self.mixture:
            if step == (stages[-1].until if stages else 0):
                break
            until = step if stage.until is None else min(stage.until, step)
            stages.append(MixtureStage(until=until, weights=stage.weights))
        return tuple(stages)

    def as_mixed_before(self, step: int) -> DataRecipe:
        """Return the same data in one stage, with each source weighted by its share of the first `step` steps."""
        shares: dict[str, float] = {}
        begins = 0
        for stage in self.mixed_before(step):
            assert stage.until is not None
            steps, total = stage.until - begins, sum(stage.weights.values())
            for name, weight in stage.weights.items():
                shares[name] = shares.get(name, 0.0) + steps * weight / total
            begins = stage.until
        return self.model_copy(update={"stages": (MixtureStage(weights=shares),)}) if shares else self

    def used_before(self, step: int) -> tuple[str, ...]:
        """Return the names of the sources that the first `step` steps read, sorted; ("",) without `sources`."""
        used = {name for stage in self.mixed_before(step) for name in stage.weights}
        return tuple(sorted(used)) if self.sources else ("",)
