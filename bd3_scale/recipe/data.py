"""The data of a recipe: one data set, or several that are mixed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bd3_scale.recipe.section import NAME, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

DATA_RETRY_MINUTES = 30.0


class DataSource(Section):
    """One of several data sets that batches are mixed of."""

    name: str = Field(pattern=NAME, description="keys its order and its noise: it stays for as long as the run does")
    path: str = Field(description="as data.path")
    remote: str | None = Field(None, description="as data.remote")
    weight: PositiveFloat | None = Field(
        None, description="share of the sequences, relative to those of the others; data.stages have them otherwise"
    )
    max_epochs: PositiveFloat | None = Field(None, description="a run that would see its sequences more often ends")


class MixtureStage(Section):
    """Weights of the sources in a range of steps."""

    until: PositiveInt | None = Field(None, description="its last step; of the last stage none")
    weights: dict[str, PositiveFloat] = Field(description="by source, relative to each other; others take no part")


class DataRecipe(Section):
    """Sharded token sequences as `bd3-scale data prepare` writes them."""

    path: str = Field("", description="folder of the shards, or of the node-local cache when `remote` is set")
    sources: Annotated[tuple[DataSource, ...], Field(strict=False)] = Field(
        (), description="in place of path and remote: data sets of one tokeniser to mix"
    )
    stages: Annotated[tuple[MixtureStage, ...], Field(strict=False)] = Field(
        (), description="weights of the sources one after the other; default: each source's weight in all steps"
    )
    remote: str | None = Field(None, description="folder or object store that MosaicML streaming reads from")
    cache_limit: str | None = Field(
        None,
        pattern=r"(?i)^\d+(\.\d+)?[kmgt]b$",
        description="bound on the node-local cache, such as 100gb, of sources on that of each; needs `remote`",
    )
    retry_minutes: NonNegativeFloat = Field(
        DATA_RETRY_MINUTES, description="for which a `remote` that is away is asked again, before the run ends"
    )
    seq_len: PositiveInt = Field(description="L, data tokens a sequence; must equal what was prepared")
    isolate_documents: bool = Field(True, description="documents packed in one sequence do not see each other")
    shuffle: bool = True
    shuffle_window: PositiveInt | None = Field(
        None,
        description="sequences that change places with each other at a time, over all machines; the more, the more of "
        "remote data each machine keeps; default: what fits into cache_limit on one machine, 65536 to 1048576",
    )
    num_workers: NonNegativeInt = Field(1, description="loader processes a rank; in a pipeline, of its first stage")

    @property
    def by_source(self) -> dict[str, DataRecipe]:
        """Return each source as if it were alone, by its name; a recipe without sources is one that has no name."""
        alone = {"sources": (), "stages": ()}
        own = {s.name: self.model_copy(update={**alone, "path": s.path, "remote": s.remote}) for s in self.sources}
        return own or {"": self}

    @property
    def remotes(self) -> list[str]:
        """Return what machines fetch data from."""
        return [source.remote for source in self.by_source.values() if source.remote is not None]

    @property
    def folders(self) -> list[str]:
        """Return the folders in which data lie that machines do not fetch."""
        return [source.path for source in self.by_source.values() if source.remote is None]

    @property
    def first_source(self) -> DataRecipe:
        """Return the first source as if it were alone: all have one tokeniser."""
        return next(iter(self.by_source.values()))

    @property
    def mixture(self) -> tuple[MixtureStage, ...]:
        """Return the weights of the sources, stage by stage; empty without sources."""
        weights = {source.name: source.weight for source in self.sources if source.weight is not None}
        return self.stages or ((MixtureStage(weights=weights),) if weights else ())

    def mixed_before(self, step: int) -> tuple[MixtureStage, ...]:
        """Return the stages of the first `step` steps, the last one ending there; empty without sources."""
        found: list[MixtureStage] = []
        for stage in self.mixture:
            if step == (found[-1].until if found else 0):
                break
            until = step if stage.until is None else min(stage.until, step)
            found.append(MixtureStage(until=until, weights=stage.weights))
        return tuple(found)

    def as_mixed_before(self, step: int) -> DataRecipe:
        """Return the same data in one stage, weighted by how much of the first `step` steps each source was."""
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
        """Return the sources that the first `step` steps read, sorted; the one without a name where it is alone."""
        used = {name for stage in self.mixed_before(step) for name in stage.weights}
        return tuple(sorted(used)) if self.sources else ("",)
