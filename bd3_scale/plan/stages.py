"""The step of any pipeline stage put together from a few small steps of models of one stage: milliseconds for what
takes seconds to trace.

What a step does is linear in the layers of a kind, in the micro-batches and in the sequences of one, and of what ZeRO
divides in 1 / data-parallel ranks. Six steps tell all of that for one way to split a layer; two more each way to
recompute it. An estimate: a shape that pays, or costs, a copy of its own is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bd3_scale.plan.job import Job
from bd3_scale.plan.trace import Key, Message, Segment, Trace, combine
from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import Vocabulary

_LAYERS = (3, 4)
_SIZES = (1, 2)
_REPLICAS = (2, 8)
_MICRO_BATCHES = 2
# What belongs to the weights of a stage, whichever micro-batches are under way.
_STATIC = ("weights", "gradients", "optimizer", "update", "buckets")
# To and from both neighbours.
_ON_THEIR_WAY = 4
_Weighted = list[tuple[float, Trace]]


@dataclass(frozen=True)
class Split:
    """How ranks split a layer, and what of its state data-parallel ranks divide."""

    tensor: int
    context: int
    zero_stage: int


@dataclass(frozen=True)
class Shape:
    """What a small step does: `layers` of one stage, `size` sequences a micro-batch, on so many `replicas`."""

    layers: int
    size: int
    replicas: int
    recompute: str


def shapes(recompute: str) -> list[Shape]:
    """Return the small steps that tell of layers which are recomputed so, beside those that are not recomputed."""
    if recompute != "none":
        return [Shape(layers, 1, 2, recompute) for layers in _LAYERS]
    few, many = _REPLICAS
    kinds = [(size, few) for size in _SIZES] + [(_SIZES[0], many)]
    return [Shape(layers, size, replicas, recompute) for size, replicas in kinds for layers in _LAYERS]


def small_job(recipe: Recipe, vocabulary: Vocabulary, split: Split, shape: Shape) -> Job:
    """Return a small step of the recipe's model."""
    parallel = {
        **{"tensor": split.tensor, "context": split.context, "zero_stage": split.zero_stage},
        **{"sequence": split.tensor > 1, "pipeline": 1, "virtual_pipeline": 1, "layers_per_chunk": None},
    }
    train = {
        **{"micro_batch_size": shape.size, "global_batch_size": _MICRO_BATCHES * shape.size * shape.replicas},
        **{"recompute": shape.recompute, "recompute_layers": None},
    }
    small = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"num_layers": shape.layers}),
            "parallel": recipe.parallel.model_copy(update=parallel),
            "train": recipe.train.model_copy(update=train),
        }
    )
    return Job(small, vocabulary, 0, split.tensor * split.context * shape.replicas, _MICRO_BATCHES)


class Parts:
    """A layer and the ends of a model, from steps that were traced, for any recipe with the same split of a layer."""

    def __init__(self, traces: dict[Shape, Trace]) -> None:
        self._rows = _rows(traces[Shape(_LAYERS[0], 1, _REPLICAS[0], "none")])
        self._traces = {shape: _lumped(trace) for shape, trace in traces.items()}
        self._known: dict[tuple[int, int, str], tuple[Trace, Trace]] = {}

    def add(self, traces: dict[Shape, Trace]) -> None:
        """Know of another way to recompute, too."""
        self._traces |= {shape: _lumped(trace) for shape, trace in traces.items()}

    def knows(self, recompute: str) -> bool:
        """Tell whether steps were traced that are recomputed so."""
        return all(shape in self._traces for shape in shapes(recompute))

    def stage(self, recipe: Recipe, gpus: int, stage: int) -> Trace:
        """Return the estimated step of a rank of a stage; see `trace_rank`."""
        parallel, train, model = recipe.parallel, recipe.train, recipe.model
        replicas = gpus // parallel.model_size
        micro_batches = train.global_batch_size // (replicas * train.micro_batch_size)
        layer, ends = self._parts(train.micro_batch_size, replicas, train.recompute)
        mine = parallel.chunks(model.num_layers)[stage :: parallel.pipeline]
        first, last = stage == 0, stage == parallel.pipeline - 1
        # Of the weights at the ends, embedding and head, what is here: tied ones are at both.
        here = 1.0 if first and last else (first + last) * (1.0 if model.tie_embeddings else 0.5)
        # Layers that have as many weights as those of the stage, beside all weights at the ends.
        weights = sum(mine) - (1 - here) * ends.parameters / layer.parameters
        repeated = micro_batches / _MICRO_BATCHES
        of_ends = _ends_here(first, last)
        whole = combine(
            _twice(
                [
                    (sum(mine) * repeated, _only(layer, _in_layers)),
                    (weights * (micro_batches - 1), _only(layer, _added_up)),
                    (micro_batches - 1, _only(ends, _added_up)),
                    (repeated, _only(ends, lambda key: _in_layers(key) and of_ends(key))),
                    (weights, _only(layer, _outside)),
                    (1.0, _only(ends, _outside)),
                ]
            )
        )
        self._send_between(whole, recipe, gpus, stage, micro_batches, ends)
        return replace(
            whole,
            segments=_segments(layer, ends, recipe, stage, micro_batches, weights, self._message_bytes(recipe)),
            micro_batches=micro_batches,
            flops=(model.num_layers * layer.flops + ends.flops) * repeated,
            parameters=model.num_layers * layer.parameters + ends.parameters,
        )

    def _parts(self, size: int, replicas: int, recompute: str) -> tuple[Trace, Trace]:
        """Return a layer between others, and all that is beside layers, with what the last layer spares."""
        found = self._known.get((size, replicas, recompute))
        if found is None:
            few, many = _LAYERS
            fewer, more = (combine(_twice(self._of(layers, size, replicas, recompute))) for layers in (few, many))
            layer = combine(_twice([(1, more), (-1, fewer)]))
            found = layer, combine(_twice([(1, fewer), (-few, layer)]))
            self._known[size, replicas, recompute] = found
        return found

    def _of(self, layers: int, size: int, replicas: int, recompute: str) -> _Weighted:
        """Return a step of other sizes as a sum of those that were traced."""

        def traced(size: int, replicas: int, recompute: str = "none") -> Trace:
            return self._traces[Shape(layers, size, replicas, recompute)]

        one, two = _SIZES
        few, many = _REPLICAS
        more = (1 / replicas - 1 / few) / (1 / many - 1 / few)
        scaled = _among(traced(one, few), replicas / few)
        parts = [(float(two - size), scaled), (float(size - one), _among(traced(two, few), replicas / few))]
        parts += [(more, traced(one, many)), (-more, traced(one, few))]
        if recompute != "none":
            parts += [(float(size), traced(one, few, recompute)), (-float(size), traced(one, few))]
        return parts

    def _message_bytes(self, recipe: Recipe) -> float:
        """Bytes of what a stage tells the next one of a micro-batch."""
        parallel, train = recipe.parallel, recipe.train
        rows = self._rows * train.micro_batch_size / (parallel.tensor if parallel.sequence else 1)
        return rows * recipe.model.hidden_size * (4 if train.precision == "fp32" else 2)

    def _send_between(
        self, trace: Trace, recipe: Recipe, gpus: int, stage: int, micro_batches: int, ends: Trace
    ) -> None:
        """Add what stages tell each other: rows, twice, to and from each chunk, and the gradients of tied weights."""
        parallel = recipe.parallel
        if parallel.pipeline == 1:
            return
        apart = gpus // parallel.pipeline
        sent = 4 * parallel.virtual_pipeline - 2 * (stage in (0, parallel.pipeline - 1))
        size = self._message_bytes(recipe)
        # Chunks of an interleaved schedule go round: the last stage sends to the first one.
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
    layer: Trace, ends: Trace, recipe: Recipe, stage: int, micro_batches: int, weights: float, message: float
) -> list[Segment]:
    """Memory over a step, of the last micro-batch that is under way with all others."""
    parallel = recipe.parallel
    chunk = parallel.chunks(recipe.model.num_layers)[stage :: parallel.pipeline][-1]
    names = [segment.name for segment in ends.segments]
    saved = layer.segments[names.index("head forward")].memory.get("activations", 0.0) * chunk
    under_way = _under_way(recipe, stage, micro_batches)
    beside = saved * (under_way - 1)
    # Interleaved schedules send beside computation: what a chunk has sent stays, and some is on its way.
    sent = message * (under_way + _ON_THEIR_WAY) if parallel.virtual_pipeline > 1 else 0.0
    last = stage == parallel.pipeline - 1
    # Interleaved schedules have the last stage go backward through chunks of middle layers, too.
    has_middle = not last or parallel.virtual_pipeline > 1
    found = []
    for is_middle in [False] * last + [True] * has_middle:
        # Where no layer is like the last one, which keeps less.
        layers = chunk + is_middle
        for index, (of_layer, of_ends) in enumerate(zip(layer.segments, ends.segments, strict=True)):
            in_layer = "first layer" in of_ends.name or "middle layer" in of_ends.name
            after = index >= len(names) - 2
            if is_middle and not (in_layer or after):
                continue
            memory = {}
            for kind in of_layer.memory.keys() | of_ends.memory.keys():
                count = weights if kind in _STATIC else layers
                memory[kind] = count * of_layer.memory.get(kind, 0.0) + of_ends.memory.get(kind, 0.0)
            if is_middle:
                memory.pop("head", None)
            if not after:
                memory["activations"] = memory.get("activations", 0.0) + beside
                memory["messages"] = sent
            found.append(Segment(of_ends.name, memory))
    return found


def _under_way(recipe: Recipe, stage: int, micro_batches: int) -> int:
    """Micro-batches times chunks whose backward has not begun when another one's forward ends, at the most."""
    parallel = recipe.parallel
    later = parallel.pipeline - stage - 1
    if parallel.virtual_pipeline == 1:
        return min(later + 1, micro_batches)
    chunks = parallel.virtual_pipeline
    return min(2 * later + (chunks - 1) * parallel.pipeline + 1, micro_batches * chunks)


def _in_layers(key: Key) -> bool:
    return key.phase == "gradients" and key.part not in ("", "gradients")


def _added_up(key: Key) -> bool:
    """Tell what all micro-batches do but the first one, which has nothing to add to."""
    return key.phase == "gradients" and key.part == "gradients"


def _outside(key: Key) -> bool:
    return key.phase != "gradients" or not key.part


def _ends_here(first: bool, last: bool) -> Callable[[Key], bool]:
    return lambda key: first if key.part == "embedding" else last


def _only(trace: Trace, keep: Callable[[Key], bool]) -> Trace:
    """Return the work and messages of a trace that are kept, without its memory."""
    return Trace(
        [],
        {key: work for key, work in trace.work.items() if keep(key)},
        {key: message for key, message in trace.messages.items() if keep(key)},
        {},
    )


def _among(trace: Trace, factor: float) -> Trace:
    """Return the trace with messages of so many times as many data-parallel ranks."""
    messages = {
        key: replace(message, ranks=_more(message.ranks, factor)) if key.direction == "data" else message
        for key, message in trace.messages.items()
    }
    return replace(trace, messages=messages)


def _more(ranks: tuple[int, ...], factor: float) -> tuple[int, ...]:
    """As many times as many ranks, as far apart."""
    apart = ranks[1] - ranks[0]
    return tuple(range(ranks[0], ranks[0] + round(len(ranks) * factor) * apart, apart))


def _lumped(trace: Trace) -> Trace:
    """Return the trace without what tells sizes apart, in names of stretches of memory, too."""
    parts = [Trace([], {key._replace(shape=""): work}, {}, {}) for key, work in trace.work.items()]
    for key, message in trace.messages.items():
        _, beside, by_size = key.shape.partition("beside")
        parts.append(Trace([], {}, {key._replace(shape=beside + by_size): message}, {}))
    whole = combine([(1.0, 1.0, part) for part in parts])
    segments = [Segment(segment.name.replace(" recomputed", ""), segment.memory) for segment in trace.segments]
    # Gradients are still fewer while those of the first micro-batch come.
    later = segments[2 + (len(segments) - 4) // _MICRO_BATCHES :]
    return replace(trace, work=whole.work, messages=whole.messages, segments=later)


def _twice(parts: Sequence[tuple[float, Trace]]) -> list[tuple[float, float, Trace]]:
    return [(weight, weight, trace) for weight, trace in parts]


def _rows(trace: Trace) -> int:
    """Return the rows that the products of a layer take, of all tensor-parallel ranks."""
    return max(
        int(key.shape.partition("x")[0])
        for key in trace.work
        if key.name in ("mm", "addmm") and key.part == "attention" and key.direction == "forward"
    )
