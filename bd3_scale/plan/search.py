"""Layouts of a run's GPUs that fit, the quickest first: estimated from a few small steps, the best ones traced whole.

What a recipe says beside its layout stays. Tensor-parallel sizes are tried in ascending order until a larger one no
longer helps though nothing is computed again, with every expert-parallel size that a node holds, or where nothing fits
so larger ones; recomputation where its layout does not fit without, and would be quicker than what fits; ZeRO above 1
and a split of the sequence where nothing else fits. Chunks of layers are even. Of layouts that are nearly as quick as
the quickest one, the one that splits the model least comes first.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bd3_scale.plan.forecast import Forecast, assemble, forecast, layout, traced_stages, with_gpu_precision
from bd3_scale.plan.hardware import Hardware
from bd3_scale.plan.kept import traces_of
from bd3_scale.plan.stages import Parts, Shape, Split, shapes, small_job
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.schema import Recipe, RecipeError
from bd3_scale.recipe.vocabulary import Vocabulary

# How far estimates were from whole traces, rounded up: of seconds, of bytes.
TIME_ERROR = 0.02
MEMORY_ERROR = 0.04
# What differs by less is equally quick, as far as anybody can predict.
_EQUAL = 0.03
# Of a card, what stays free: for a micro-batch with more masks than the average one, and for what nobody measured yet.
ROOM = 0.05
_TENSOR = (1, 2, 4, 8)
_CONTEXT = (1, 2, 4, 8)
_EXPERT = (1, 2, 4, 8, 16, 32, 64)
_SIZES = (1, 2, 4, 8)
_MOST_STAGES = 16
# Of a stage: more of them shorten the bubble by little, and take long to trace.
_MOST_CHUNKS = 4
# Where attention, whose work grows with the square, and single sequences fill a GPU.
_LONG = 32768
_KEYS = (
    *("parallel.tensor", "parallel.sequence", "parallel.pipeline", "parallel.virtual_pipeline"),
    *("parallel.layers_per_chunk", "parallel.context", "parallel.expert", "parallel.zero_stage"),
    *("train.micro_batch_size", "train.recompute", "train.recompute_layers"),
)


@dataclass(frozen=True)
class Layout:
    """A layout with what is known of it.

    Attributes:
        forecast: estimated, or of a whole trace.
        estimate: what was estimated before the whole trace.
    """

    forecast: Forecast
    estimate: Forecast | None = None

    @property
    def verified(self) -> bool:
        return self.estimate is not None

    @property
    def seconds(self) -> float:
        return self.forecast.time.seconds

    @property
    def margin_bytes(self) -> int:
        """Return what is left on the fullest card."""
        return min(rank.margin_bytes for rank in self.forecast.ranks)

    @property
    def possible(self) -> bool:
        """Tell whether it fits with room to spare; of an estimate whether it may."""
        error, room = 0.0 if self.verified else MEMORY_ERROR, ROOM * self.forecast.hardware.memory_bytes
        return all(rank.margin_bytes >= room - error * rank.card_bytes for rank in self.forecast.ranks)

    @property
    def pieces(self) -> int:
        """Return into how many parts the model is split."""
        parallel = self.forecast.recipe.parallel
        return parallel.model_size * parallel.virtual_pipeline * parallel.expert


@dataclass
class Found:
    """What a search has found: layouts that fit, the verified and quickest ones first, or why there is none."""

    recipe: Recipe
    gpus: int
    layouts: list[Layout]
    reason: str | None = None

    def overrides(self, found: Layout) -> list[str]:
        """Return what of the recipe a layout changes, as KEY=VALUE."""
        return [
            f"{key}={_as_yaml(new)}"
            for key in _KEYS
            if (new := _value(found.forecast.recipe, key)) != _value(self.recipe, key)
        ]

    def as_json(self) -> dict[str, Any]:
        """Return all of it as values of JSON; seconds and bytes."""
        return {
            "predicted": True,
            "recipe": self.recipe.name,
            "gpus": self.gpus,
            "reason": self.reason,
            "layouts": [
                {
                    "layout": layout(found.forecast.recipe, self.gpus),
                    "overrides": self.overrides(found),
                    "verified": found.verified,
                    "step_seconds": found.seconds,
                    "tokens_per_second": found.forecast.tokens_per_second,
                    "mfu": found.forecast.time.mfu,
                    "card_bytes": max(rank.card_bytes for rank in found.forecast.ranks),
                    "margin_bytes": found.margin_bytes,
                }
                for found in self.layouts
            ],
        }


def search(
    recipe: Recipe,
    vocabulary: Vocabulary,
    gpus: int,
    hardware: Hardware,
    *,
    device: str = "cuda",
    best: int = 3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """Return layouts of `recipe` on `gpus`, of which the `best` ones are verified.

    device, progress: as in `forecast`. ValueError: the recipe does not fit itself, whatever its layout.
    """
    looked = _Search(with_gpu_precision(recipe), vocabulary, gpus, hardware, device, _Progress(progress))
    looked.check()
    contexts = _CONTEXT if recipe.data.seq_len >= _LONG else (1,)
    for zero_stage, context in ((1, contexts), (2, contexts), (1, _CONTEXT[1:]), (2, _CONTEXT[1:])):
        for size in context:
            looked.look(zero_stage, size)
        if found := looked.verified(best):
            return Found(recipe, gpus, found)
    if found := looked.with_divided_weights():
        return Found(recipe, gpus, found)
    return Found(recipe, gpus, [], looked.lacking())


@dataclass
class _Progress:
    """Traces that are done, of those that are known to be needed."""

    tell: Callable[[int, int], None]
    done: int = 0
    total: int = 0

    def expect(self, count: int) -> None:
        self.total += count
        self.tell(self.done, self.total)

    def one(self) -> None:
        self.done += 1
        self.tell(self.done, self.total)


@dataclass
class _Search:
    """Layouts that were looked at so far."""

    recipe: Recipe
    vocabulary: Vocabulary
    gpus: int
    hardware: Hardware
    device: str
    progress: _Progress
    layouts: list[Layout] = field(default_factory=list)

    def check(self) -> None:
        """Check that some layout would do, as far as the recipe goes. RecipeError: the problems of the plainest one."""
        if not any(True for tensor in _TENSOR for _ in self._recipes(Split(tensor, 1, 1))):
            check_recipe(_laid_out(self.recipe, Split(1, 1, 1), 1, 1, 1), self.gpus)

    def look(self, zero_stage: int, context: int) -> None:
        """Estimate all layouts that split sequences so; experts are in a node, or where nothing fits so, in several."""
        in_node = self.hardware.gpus_per_node
        for over_nodes in (False, True):
            for tensor in _TENSOR:
                if tensor * context > max(in_node, context):
                    continue
                sizes = _EXPERT if self.recipe.model.moe else (1,)
                splits = [
                    Split(tensor, context, zero_stage, expert)
                    for expert in sizes
                    if (tensor * expert > in_node and expert > 1) == over_nodes
                ]
                best = self._best()
                for split in splits:
                    if any(True for _ in self._recipes(split)):
                        self._look_at(split)
                # Where nothing is computed again, smaller parts of layers spare nothing.
                if best is not None and best is self._best() and best.forecast.recipe.train.recompute == "none":
                    return
            if self._best() is not None:
                return

    def _best(self) -> Layout | None:
        return min((each for each in self.layouts if each.possible), key=lambda each: each.seconds, default=None)

    def _look_at(self, split: Split) -> None:
        """Estimate layouts of a split of layers."""
        parts = Parts(split, self._traces(split, "none"))
        plain = [Layout(self._estimate(parts, recipe)) for recipe in self._recipes(split)]
        found = [each for each in plain if each.possible]
        too_large = [each for each in plain if not each.possible]
        for recompute in ("selective", "full"):
            # Without recomputation a step is quicker than with it.
            hopeful = [each for each in too_large if self._would_help(each, found)]
            if not hopeful:
                break
            parts.add(self._traces(split, recompute))
            tried = [Layout(self._estimate(parts, _recomputed(each.forecast.recipe, recompute))) for each in hopeful]
            found += [each for each in tried if each.possible]
            too_large = [plain for plain, each in zip(hopeful, tried, strict=True) if not each.possible]
            self.layouts += [each for each in tried if not each.possible]
        self.layouts += found + too_large

    def _would_help(self, layout: Layout, found: Sequence[Layout]) -> bool:
        best = min((each.seconds for each in [*found, *self.layouts] if each.possible), default=math.inf)
        return layout.seconds * (1 + TIME_ERROR) < best

    def verified(self, count: int) -> list[Layout]:
        """Return the layouts that fit, the best `count` of them as whole traces say, in their order."""
        possible = _in_order(each for each in self.layouts if each.possible)
        verified: list[Layout] = []
        while possible and len(verified) < count:
            estimated = possible.pop(0)
            whole = Layout(self._forecast(estimated.forecast.recipe), estimated.forecast)
            self.layouts = [whole if each is estimated else each for each in self.layouts]
            verified += [whole] if whole.possible else []
        return _in_order(verified) + possible if verified else []

    def with_divided_weights(self) -> list[Layout]:
        """Return a layout that fits with ZeRO-3, if one does: weights are divided, too."""
        for tensor in reversed(_TENSOR):
            recipe = _recomputed(_laid_out(self.recipe, Split(tensor, 1, 3), 1, 1, 1), "full")
            if tensor <= self.hardware.gpus_per_node and _is_allowed(recipe, self.gpus):
                found = self._forecast(recipe)
                self.layouts.append(Layout(found, found))
                return [each for each in self.layouts[-1:] if each.possible]
        return []

    def lacking(self) -> str:
        """Return which layout comes nearest to fitting, what it lacks, and what would help."""
        nearest = max(self.layouts, key=lambda each: each.margin_bytes)
        lack = ROOM * self.hardware.memory_bytes - nearest.margin_bytes
        rank = min(nearest.forecast.ranks, key=lambda rank: rank.margin_bytes)
        kind, size = next(iter(rank.memory.items()))
        return (
            f"no layout of {self.recipe.name} fits {self.gpus} {self.hardware.device}. The nearest, "
            f"{layout(nearest.forecast.recipe, self.gpus)}, lacks {lack / 1e9:.1f} GB of "
            f"{self.hardware.memory_gb:g}, of which {ROOM:.0%} are to stay free, on stage {rank.stage}, most of it "
            f"{kind} ({size / 1e9:.1f} GB): "
            f"{_HELP.get(kind, 'more or larger GPUs')}"
        )

    def _recipes(self, split: Split) -> Iterator[Recipe]:
        """Layouts that the recipe's rules allow, without recomputation."""
        layers = self.recipe.model.num_layers
        for stages in range(1, min(_MOST_STAGES, layers) + 1):
            for chunks in range(1, min(_MOST_CHUNKS, layers // stages) + 1):
                if layers % (stages * chunks) or (stages == 1 and chunks > 1):
                    continue
                for size in _SIZES:
                    recipe = _laid_out(self.recipe, split, stages, chunks, size)
                    if _is_allowed(recipe, self.gpus):
                        yield recipe

    def _traces(self, split: Split, recompute: str) -> dict[Shape, Any]:
        wanted = shapes(recompute, self.recipe.model)
        jobs = [small_job(self.recipe, self.vocabulary, split, shape) for shape in wanted]
        self.progress.expect(len(jobs))
        traced = traces_of(jobs, self.hardware, device=self.device, done=self.progress.one)
        return dict(zip(wanted, traced, strict=True))

    def _estimate(self, parts: Parts, recipe: Recipe) -> Forecast:
        traces = {stage: parts.stage(recipe, self.gpus, stage) for stage in traced_stages(recipe)}
        return assemble(recipe, self.vocabulary, self.gpus, self.hardware, traces)

    def _forecast(self, recipe: Recipe) -> Forecast:
        before = self.progress.done, self.progress.total

        def progress(done: int, total: int) -> None:
            self.progress.done, self.progress.total = before[0] + done, before[1] + total
            self.progress.tell(self.progress.done, self.progress.total)

        return forecast(recipe, self.vocabulary, self.gpus, self.hardware, device=self.device, progress=progress)


_HELP = {
    "activations": "shorter or fewer sequences (data.seq_len, diffusion.noisy_copies), or larger GPUs",
    "optimizer": "more GPUs to divide it among, or parallel.offload_optimizer=true",
    "weights": "more GPUs, or larger ones",
    "gradients": "more GPUs, or larger ones",
}


def _in_order(layouts: Iterable[Layout]) -> list[Layout]:
    """The quickest first, but among those that may be the quickest the one that splits the model least."""
    found = list(layouts)
    quickest = min((each.seconds for each in found), default=0.0)

    def place(each: Layout) -> tuple[int, float]:
        return (each.pieces if each.seconds <= quickest * (1 + _EQUAL) else sys.maxsize, each.seconds)

    return sorted(found, key=place)


def _laid_out(recipe: Recipe, split: Split, stages: int, chunks: int, size: int) -> Recipe:
    parallel = {
        **{"tensor": split.tensor, "sequence": split.tensor > 1, "context": split.context, "expert": split.expert},
        **{"zero_stage": split.zero_stage, "pipeline": stages, "virtual_pipeline": chunks, "layers_per_chunk": None},
    }
    train = {"micro_batch_size": size, "recompute": "none", "recompute_layers": None}
    return recipe.model_copy(
        update={
            "parallel": recipe.parallel.model_copy(update=parallel),
            "train": recipe.train.model_copy(update=train),
        }
    )


def _recomputed(recipe: Recipe, recompute: str) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"recompute": recompute})})


def _is_allowed(recipe: Recipe, gpus: int) -> bool:
    try:
        check_recipe(recipe, gpus)
    except RecipeError:
        return False
    return True


def _value(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def _as_yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower()
