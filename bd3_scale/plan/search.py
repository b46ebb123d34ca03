"""Search the layouts of a run's GPUs that fit, the fastest first.

Layouts are estimated from a few small steps, and the best ones are then traced whole. Everything else in the recipe
stays as it is. The search tries:

- tensor-parallel sizes in ascending order, until a larger one does not help although nothing is recomputed;
- every expert-parallel size that a node can hold, and larger ones if nothing fits;
- recomputation for a layout that does not fit without it and would be faster than those that fit;
- ZeRO above 1 and context parallelism, if nothing else fits.

All chunks of a pipeline have equally many layers. Among layouts that are nearly as fast as the fastest, the one that
splits the model least comes first.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bd3_scale.plan.forecast import Forecast, assemble, forecast, layout, traced_stages, with_gpu_precision
from bd3_scale.plan.hardware import Hardware
from bd3_scale.plan.stages import Parts, Shape, Split, shapes, small_job
from bd3_scale.plan.trace_cache import traces_of
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.schema import Recipe, RecipeError
from bd3_scale.recipe.vocabulary import Vocabulary

# The largest relative errors of estimates against whole traces that were seen, rounded up: of seconds, of bytes.
TIME_ERROR = 0.02
MEMORY_ERROR = 0.04
# Layouts whose times differ by less count as equally fast: predictions are not more exact than that.
_EQUAL = 0.03
# The share of a card that stays free: for micro-batches with more masks than the average, and for what is not modelled.
ROOM = 0.05
_TENSOR = (1, 2, 4, 8)
_CONTEXT = (1, 2, 4, 8)
_EXPERT = (1, 2, 4, 8, 16, 32, 64)
_SIZES = (1, 2, 4, 8)
_MOST_STAGES = 16
# Chunks of a stage: more of them shorten the bubble by little, and take long to trace.
_MOST_CHUNKS = 4
# From this sequence length on context parallelism is always tried: attention, whose work grows with the square of the
# length, dominates, and a single sequence fills a GPU.
_LONG = 32768
_KEYS = (
    *("parallel.tensor", "parallel.sequence", "parallel.pipeline", "parallel.virtual_pipeline"),
    *("parallel.layers_per_chunk", "parallel.context", "parallel.expert", "parallel.zero_stage"),
    *("train.micro_batch_size", "train.recompute", "train.recompute_layers"),
)


@dataclass(frozen=True)
class Layout:
    """A layout and its forecast.

    Attributes:
        forecast: from an estimate, or from a whole trace.
        estimate: the estimate before the whole trace; None without a whole trace.
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
        """Return the bytes that are left on the fullest card."""
        return min(rank.margin_bytes for rank in self.forecast.ranks)

    @property
    def possible(self) -> bool:
        """Say whether it fits with ROOM to spare; for an estimate, whether it may fit within MEMORY_ERROR."""
        error, room = 0.0 if self.verified else MEMORY_ERROR, ROOM * self.forecast.hardware.memory_bytes
        return all(rank.margin_bytes >= room - error * rank.card_bytes for rank in self.forecast.ranks)

    @property
    def pieces(self) -> int:
        """Return the number of parts into which the model is split."""
        parallel = self.forecast.recipe.parallel
        return parallel.model_size * parallel.virtual_pipeline * parallel.expert


@dataclass
class SearchResult:
    """The result of a search: the layouts that fit, verified ones first and the fastest first, or why none fits."""

    recipe: Recipe
    gpus: int
    layouts: list[Layout]
    reason: str | None = None

    def overrides(self, found: Layout) -> list[str]:
        """Return the values of the recipe that a layout changes, as KEY=VALUE."""
        return [
            f"{key}={_as_yaml(new)}"
            for key in _KEYS
            if (new := _value(found.forecast.recipe, key)) != _value(self.recipe, key)
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the result as values of JSON, in seconds and bytes."""
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
) -> SearchResult:
    """Search the layouts of `recipe` on `gpus`, and verify the `best` ones by whole traces.

    device, progress: as in `forecast`. ValueError: the recipe contradicts itself in every layout.
    """
    looked = _Search(with_gpu_precision(recipe), vocabulary, gpus, hardware, device, _Progress(progress))
    looked.check()
    contexts = _CONTEXT if recipe.data.seq_len >= _LONG else (1,)
    for zero_stage, context in ((1, contexts), (2, contexts), (1, _CONTEXT[1:]), (2, _CONTEXT[1:])):
        for size in context:
            looked.look(zero_stage, size)
        if found := looked.verified(best):
            return SearchResult(recipe, gpus, found)
    if found := looked.with_divided_weights():
        return SearchResult(recipe, gpus, found)
    return SearchResult(recipe, gpus, [], looked.lacking())


@dataclass
class _Progress:
    """The number of finished traces, and of those known to be needed."""

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
    """A search in progress, with the layouts that were estimated so far."""

    recipe: Recipe
    vocabulary: Vocabulary
    gpus: int
    hardware: Hardware
    device: str
    progress: _Progress
    layouts: list[Layout] = field(default_factory=list)

    def check(self) -> None:
        """Check that the recipe allows some layout. RecipeError: none; the message is that of the simplest layout."""
        if not any(True for tensor in _TENSOR for _ in self._recipes(Split(tensor, 1, 1))):
            check_recipe(_laid_out(self.recipe, Split(1, 1, 1), 1, 1, 1), self.gpus)

    def look(self, zero_stage: int, context: int) -> None:
        """Estimate all layouts with this ZeRO stage and context size; experts span nodes only if nothing else fits."""
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
                # If the best layout recomputes nothing, splitting layers further saves no time.
                if best is not None and best is self._best() and best.forecast.recipe.train.recompute == "none":
                    return
            if self._best() is not None:
                return

    def _best(self) -> Layout | None:
        return min((each for each in self.layouts if each.possible), key=lambda each: each.seconds, default=None)

    def _look_at(self, split: Split) -> None:
        """Estimate the layouts with this split of a layer."""
        parts = Parts(split, self._traces(split, "none"))
        plain = [Layout(self._estimate(parts, recipe)) for recipe in self._recipes(split)]
        found = [each for each in plain if each.possible]
        too_large = [each for each in plain if not each.possible]
        for recompute in ("selective", "full"):
            # A step without recomputation is a lower bound of the time with it.
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
        """Return the layouts that fit in their order; the best `count` are verified by whole traces."""
        possible = _in_order(each for each in self.layouts if each.possible)
        verified: list[Layout] = []
        while possible and len(verified) < count:
            estimated = possible.pop(0)
            whole = Layout(self._forecast(estimated.forecast.recipe), estimated.forecast)
            self.layouts = [whole if each is estimated else each for each in self.layouts]
            verified += [whole] if whole.possible else []
        return _in_order(verified) + possible if verified else []

    def with_divided_weights(self) -> list[Layout]:
        """Return a layout with ZeRO-3, which divides the weights as well, if one fits."""
        for tensor in reversed(_TENSOR):
            recipe = _recomputed(_laid_out(self.recipe, Split(tensor, 1, 3), 1, 1, 1), "full")
            if tensor <= self.hardware.gpus_per_node and _is_allowed(recipe, self.gpus):
                found = self._forecast(recipe)
                self.layouts.append(Layout(found, found))
                return [each for each in self.layouts[-1:] if each.possible]
        return []

    def lacking(self) -> str:
        """Return a message with the layout that comes nearest to fitting, what it lacks, and what would help."""
        nearest = max(self.layouts, key=lambda each: each.margin_bytes)
        lack = ROOM * self.hardware.memory_bytes - nearest.margin_bytes
        rank = min(nearest.forecast.ranks, key=lambda rank: rank.margin_bytes)
        category, size = next(iter(rank.memory.items()))
        return (
            f"no layout of {self.recipe.name} fits {self.gpus} {self.hardware.device}. The nearest, "
            f"{layout(nearest.forecast.recipe, self.gpus)}, lacks {lack / 1e9:.1f} GB of "
            f"{self.hardware.memory_gb:g}, of which {ROOM:.0%} are to stay free, on stage {rank.stage}, most of it "
            f"{category} ({size / 1e9:.1f} GB): "
            f"{_HELP.get(category, 'more or larger GPUs')}"
        )

    def _recipes(self, split: Split) -> Iterator[Recipe]:
        """Yield the recipe in each layout that its rules allow, without recomputation."""
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
    """Return the layouts, the fastest first; those nearly as fast as the fastest come by how little they split."""
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
