"""Estimate the step of any pipeline stage from a few small steps of models of one stage.

An estimate takes milliseconds, a trace seconds. The work and memory of a step are linear in the number of layers of
each sort, in the number of micro-batches, and in the number of sequences of a micro-batch. What ZeRO divides is linear
in 1 / (data-parallel ranks). Six small steps determine these functions for one split of a layer, and two more for each
way of recomputation. In models whose first layers have no experts, half as many more determine those layers.

It is an estimate because some shapes need a copy that others do not, which the small steps may not show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bd3_scale.plan.job import Job
from bd3_scale.plan.trace import REPLICAS, Key, Message, Segment, Trace, combine
from bd3_scale.recipe.schema import ModelRecipe, Recipe
from bd3_scale.recipe.vocabulary import Vocabulary

_LAYERS = (3, 4)
# The number of layers without experts, in the small models with such layers.
_DENSE = 1
_SIZES = (1, 2)
_REPLICAS = (2, 8)
_MICRO_BATCHES = 2
# Categories of memory that each pending micro-batch adds to.
_ROWS_KEPT = ("activations", "routed")
# Categories that depend on the weights of a stage and not on micro-batches.
_STATIC = ("weights", "gradients", "optimizer", "update", "buckets")
# Messages of an interleaved schedule that are being sent at a time: to and from both neighbours.
_ON_THEIR_WAY = 4
_Weighted = list[tuple[float, Trace]]


@dataclass(frozen=True)
class Split:
    """The split of a layer over ranks, and which of its states data-parallel ranks divide."""

    tensor: int
    context: int
    zero_stage: int
    expert: int = 1

    def replicas(self, times: int) -> int:
        """Return `times` the least number of data-parallel ranks that the expert-parallel size needs."""
        return times * (self.expert // math.gcd(self.expert, self.context))


@dataclass(frozen=True)
class Shape:
    """The shape of a small step.

    Attributes:
        layers: their number, in one stage.
        size: sequences of a micro-batch.
        replicas: factor of the least number of data-parallel ranks, see `Split.replicas`.
        recompute: the way of recomputation.
        dense: the number of first layers without experts, in models where others have experts.
    """

    layers: int
    size: int
    replicas: int
    recompute: str
    dense: int = 0


def shapes(recompute: str, model: ModelRecipe) -> list[Shape]:
    """Return the small steps needed for a way of recomputation, in addition to those without recomputation."""
    few, many = _REPLICAS
    loads = [(size, few) for size in _SIZES] + [(_SIZES[0], many)]
    if recompute != "none":
        loads = loads[:1]
    layers = [(count, 0) for count in _LAYERS] + [(_LAYERS[0], _DENSE)] * _has_both_kinds(model)
    return [Shape(count, *load, recompute, dense) for load in loads for count, dense in layers]


def _has_both_kinds(model: ModelRecipe) -> bool:
    return 0 < model.dense_layers < model.num_layers


def small_job(recipe: Recipe, vocabulary: Vocabulary, split: Split, shape: Shape) -> Job:
    """Return a small step of the recipe's model."""
    parallel = {
        **{"tensor": split.tensor, "context": split.context, "zero_stage": split.zero_stage},
        **{"sequence": split.tensor > 1, "pipeline": 1, "virtual_pipeline": 1, "layers_per_chunk": None},
        **{"expert": split.expert},
    }
    replicas = split.replicas(shape.replicas)
    train = {
        **{"micro_batch_size": shape.size, "global_batch_size": _MICRO_BATCHES * shape.size * replicas},
        **{"recompute": shape.recompute, "recompute_layers": None},
    }
    moe = recipe.model.moe and recipe.model.moe.model_copy(update={"first_dense_layers": shape.dense})
    small = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"num_layers": shape.layers, "moe": moe}),
            "parallel": recipe.parallel.model_copy(update=parallel),
            "train": recipe.train.model_copy(update=train),
        }
    )
    return Job(small, vocabulary, 0, split.tensor * split.context * replicas, _MICRO_BATCHES)


class Parts:
    """The traces of a layer and of the ends of a model, for any recipe with the same split of a layer."""

    def __init__(self, split: Split, traces: dict[Shape, Trace]) -> None:
        self._split = split
        self._rows = _rows(traces[Shape(_LAYERS[0], 1, _REPLICAS[0], "none")])
        self._traces = {shape: _lumped(trace) for shape, trace in traces.items()}
        self._known: dict[tuple[int, int, str], tuple[Trace, Trace, Trace]] = {}

    def add(self, traces: dict[Shape, Trace]) -> None:
        """Add the traces of another way of recomputation."""
        self._traces |= {shape: _lumped(trace) for shape, trace in traces.items()}

    def stage(self, recipe: Recipe, gpus: int, stage: int) -> Trace:
        """Return the estimated step of a rank of a stage; see `trace_rank`."""
        parallel, train, model = recipe.parallel, recipe.train, recipe.model
        replicas = gpus // parallel.model_size
        micro_batches = train.global_batch_size // (replicas * train.micro_batch_size)
        layer, dense, ends = self._parts(train.micro_batch_size, replicas, train.recompute)
        whole_model = combine(_twice([(model.num_layers, layer), (_dense(model), dense), (1.0, ends)]))
        mine = parallel.chunks(model.num_layers)[stage :: parallel.pipeline]
        # The average of the layers of this stage.
        layer = combine(_twice([(1.0, layer), (_dense_here(recipe, stage) / sum(mine), dense)]))
        first, last = stage == 0, stage == parallel.pipeline - 1
        # The share of the end weights (embedding and head) on this stage; tied ones are on both end stages.
        here = 1.0 if first and last else (first + last) * (1.0 if model.tie_embeddings else 0.5)
        repeated = micro_batches / _MICRO_BATCHES
        of_ends = _ends_here(first, last)
        whole = combine(
            _twice(
                [
                    (sum(mine) * repeated, _only(layer, _in_layers)),
                    (sum(mine) * (micro_batches - 1), _only(layer, _added_up)),
                    (here * (micro_batches - 1), _only(ends, _added_up)),
                    (repeated, _only(ends, lambda key: _in_layers(key) and of_ends(key))),
                    (sum(mine), _only(layer, _outside)),
                    (here, _only(ends, _outside)),
                ]
            )
        )
        self._send_between(whole, recipe, gpus, stage, micro_batches, ends)
        return replace(
            whole,
            segments=_segments(layer, ends, recipe, stage, micro_batches, here, self._message_bytes(recipe)),
            micro_batches=micro_batches,
            flops=whole_model.flops * repeated,
            parameters=whole_model.parameters,
        )

    def _parts(self, size: int, replicas: int, recompute: str) -> tuple[Trace, Trace, Trace]:
        """Return the traces of a middle layer, of the difference of a layer without experts, and of all outside layers.

        The last one includes the (negative) difference of the model's last layer, which computes less.
        """
        found = self._known.get((size, replicas, recompute))
        if found is None:
            few, many = _LAYERS

            def step(layers: int, dense: int = 0) -> Trace:
                return combine(_twice(self._of(Shape(layers, size, replicas, recompute, dense))))

            fewer = step(few)
            layer = combine(_twice([(1, step(many)), (-1, fewer)]))
            has_dense = any(shape.dense for shape in self._traces)
            dense = combine(_twice([(1 / _DENSE, step(few, _DENSE) if has_dense else fewer), (-1 / _DENSE, fewer)]))
            found = layer, dense, combine(_twice([(1, fewer), (-few, layer)]))
            self._known[size, replicas, recompute] = found
        return found

    def _of(self, wanted: Shape) -> _Weighted:
        """Return a step with another size and other replicas as a weighted sum of traced steps."""

        def traced(size: int, replicas: int, recompute: str = "none") -> Trace:
            return self._traces[replace(wanted, size=size, replicas=replicas, recompute=recompute)]

        # Linear in the size through the traces of two sizes, and linear in 1 / replicas through those of two numbers.
        size, replicas = wanted.size, wanted.replicas / self._split.replicas(1)
        one, two = _SIZES
        few, many = _REPLICAS
        more = (1 / replicas - 1 / few) / (1 / many - 1 / few)
        scaled = _among(traced(one, few), replicas / few)
        parts = [(float(two - size), scaled), (float(size - one), _among(traced(two, few), replicas / few))]
        parts += [(more, traced(one, many)), (-more, traced(one, few))]
        if wanted.recompute != "none":
            parts += [(float(size), traced(one, few, wanted.recompute)), (-float(size), traced(one, few))]
        return parts

    def _message_bytes(self, recipe: Recipe) -> float:
        """Return the bytes that a stage sends to the next one for a micro-batch."""
        parallel, train = recipe.parallel, recipe.train
        rows = self._rows * train.micro_batch_size / (parallel.tensor if parallel.sequence else 1)
        return rows * recipe.model.hidden_size * (4 if train.precision == "fp32" else 2)

    def _send_between(
        self, trace: Trace, recipe: Recipe, gpus: int, stage: int, micro_batches: int, ends: Trace
    ) -> None:
        """Add the messages between stages: rows and their gradients of each chunk, and gradients of tied weights."""
        parallel = recipe.parallel
        if parallel.pipeline == 1:
            return
        apart = gpus // parallel.pipeline
        sent = 4 * parallel.virtual_pipeline - 2 * (stage in (0, parallel.pipeline - 1))
        size = self._message_bytes(recipe)
        # In an interleaved schedule the last stage also sends to the first one.
        goes_round = parallel.virtual_pipeline > 1
        others = {
            (stage + step) % parallel.pipeline
            for step in (1, -1)
            if goes_round or 0 <= stage + step < parallel.pipeline
        }
        for other in sorted(others):
            ranks = tuple(sorted((stage * apart, other * apart)))
            for name in ("send", "recv_"):
                calls = sent / 2 * micro_batches / len(others)
                trace.messages[Key("gradients", "", "pipeline", name, f"{ranks}")] = Message(ranks, calls, calls * size)
        if recipe.model.tie_embeddings and stage in (0, parallel.pipeline - 1):
            shared = Message((0, apart * (parallel.pipeline - 1)), 1, 4 * ends.parameters / parallel.tensor)
            trace.messages[Key("gradients", "", "tied", "allreduce_", "")] = shared


def _segments(
    layer: Trace, ends: Trace, recipe: Recipe, stage: int, micro_batches: int, here: float, message: float
) -> list[Segment]:
    """Return the memory over a step, at the micro-batch with the most others pending.

    here: the share of the end weights on this stage; message: the bytes of a message between stages.
    """
    parallel = recipe.parallel
    mine = parallel.chunks(recipe.model.num_layers)[stage :: parallel.pipeline]
    chunk = mine[-1]
    names = [segment.name for segment in ends.segments]
    saved = layer.segments[names.index("head forward")].memory
    pending = _pending(recipe, stage, micro_batches)
    # Interleaved schedules overlap messages with computation: outputs that were sent stay in memory, see
    # `deallocate_pipeline_outputs` in `model.config`, and further messages are being sent.
    sent = message * (pending + _ON_THEIR_WAY) if parallel.virtual_pipeline > 1 else 0.0
    last = stage == parallel.pipeline - 1
    # In interleaved schedules the last stage has chunks of middle layers, too.
    has_middle = not last or parallel.virtual_pipeline > 1
    segments = []
    for is_middle in [False] * last + [True] * has_middle:
        # A chunk without the model's last layer, which keeps less than others, has one more full layer.
        layers = chunk + is_middle
        for index, (of_layer, of_ends) in enumerate(zip(layer.segments, ends.segments, strict=True)):
            in_layer = "first layer" in of_ends.name or "middle layer" in of_ends.name
            after = index >= len(names) - 2
            if is_middle and not (in_layer or after):
                continue
            memory = {}
            for kind in of_layer.memory.keys() | of_ends.memory.keys():
                static = kind in _STATIC
                memory[kind] = (sum(mine) if static else layers) * of_layer.memory.get(kind, 0.0)
                memory[kind] += (here if static else 1.0) * of_ends.memory.get(kind, 0.0)
            if is_middle:
                memory.pop("head", None)
            if not after:
                for kind in _ROWS_KEPT:
                    memory[kind] = memory.get(kind, 0.0) + saved.get(kind, 0.0) * chunk * (pending - 1)
                memory["messages"] = sent
            segments.append(Segment(of_ends.name, memory))
    return segments


def _dense(model: ModelRecipe) -> int:
    """Return the number of layers without experts, in a model where others have experts."""
    return model.dense_layers if _has_both_kinds(model) else 0


def _dense_here(recipe: Recipe, stage: int) -> int:
    """Return how many layers without experts are on a stage."""
    chunks = recipe.parallel.chunks(recipe.model.num_layers)
    starts = [sum(chunks[:chunk]) for chunk in range(len(chunks))]
    dense = [min(layers, max(0, _dense(recipe.model) - start)) for start, layers in zip(starts, chunks, strict=True)]
    return sum(dense[stage :: recipe.parallel.pipeline])


def _pending(recipe: Recipe, stage: int, micro_batches: int) -> int:
    """Return the most forward passes of chunks that wait for their backward at a time.

    1F1B: p − stage micro-batches. Interleaved with v chunks: 2 (p − stage − 1) + (v − 1) p + 1 (Narayanan et al., SC
    2021, and megatron-core's warm-up).
    """
    parallel = recipe.parallel
    later = parallel.pipeline - stage - 1
    if parallel.virtual_pipeline == 1:
        return min(later + 1, micro_batches)
    chunks = parallel.virtual_pipeline
    return min(2 * later + (chunks - 1) * parallel.pipeline + 1, micro_batches * chunks)


def _in_layers(key: Key) -> bool:
    return key.phase == "gradients" and key.part not in ("", "gradients")


def _added_up(key: Key) -> bool:
    """Say whether all micro-batches but the first do this: adding gradients, for which the first has no summand."""
    return key.phase == "gradients" and key.part == "gradients"


def _outside(key: Key) -> bool:
    return key.phase != "gradients" or not key.part


def _ends_here(first: bool, last: bool) -> Callable[[Key], bool]:
    return lambda key: first if key.part == "embedding" else last


def _only(trace: Trace, keep: Callable[[Key], bool]) -> Trace:
    """Return the work and messages of a trace whose keys `keep` accepts, without its memory."""
    return Trace(
        [],
        {key: work for key, work in trace.work.items() if keep(key)},
        {key: message for key, message in trace.messages.items() if keep(key)},
        {},
    )


def _among(trace: Trace, factor: float) -> Trace:
    """Return the trace with its messages between `factor` times as many data-parallel ranks."""
    messages = {
        key: replace(message, ranks=_more(message.ranks, factor)) if key.direction in REPLICAS else message
        for key, message in trace.messages.items()
    }
    return replace(trace, messages=messages)


def _more(ranks: tuple[int, ...], factor: float) -> tuple[int, ...]:
    """Return `factor` times as many ranks, at the same distance."""
    apart = ranks[1] - ranks[0]
    return tuple(range(ranks[0], ranks[0] + round(len(ranks) * factor) * apart, apart))


def _lumped(trace: Trace) -> Trace:
    """Return the trace with shapes removed from its keys, and the sort of recomputation from names of segments.

    Traces of different sizes then have the same keys and segments, and can be added.
    """
    parts = [Trace([], {key._replace(shape=""): work}, {}, {}) for key, work in trace.work.items()]
    for key, message in trace.messages.items():
        _, marker, by_work = key.shape.partition("overlapping")
        parts.append(Trace([], {}, {key._replace(shape=marker + by_work): message}, {}))
    whole = combine([(1.0, 1.0, part) for part in parts])
    segments = [Segment(segment.name.replace(" recomputed", ""), segment.memory) for segment in trace.segments]
    # Drop the segments of the first micro-batch, in which not all gradients are allocated yet.
    later = segments[2 + (len(segments) - 4) // _MICRO_BATCHES :]
    return replace(trace, work=whole.work, messages=whole.messages, segments=later)


def _twice(parts: Sequence[tuple[float, Trace]]) -> list[tuple[float, float, Trace]]:
    return [(weight, weight, trace) for weight, trace in parts]


def _rows(trace: Trace) -> int:
    """Return the rows of a sequence that a layer computes, over all tensor-parallel ranks."""
    # From attention, which takes all rows at once; products may take them stream by stream.
    return max(int(key.shape) for key in trace.work if key.name == "block_attention")
