"""What one rank asks of its device, written down while its code runs on fake tensors.

Legend of parts: the piece of the model that an operator belongs to; in backward that of the forward operator that it
is the derivative of, which autograd's sequence numbers tell.
"""

from __future__ import annotations

import bisect
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from bd3_scale.model.block import MLP, Attention, Block, Norm
from bd3_scale.model.decoder import Decoder
from bd3_scale.model.experts import Experts
from bd3_scale.model.head import OutputLayer
from bd3_scale.model.mixture import Mixture
from bd3_scale.model.router import Router
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.plan.operators import is_waited_for_later, lies_on, moved_bytes
from bd3_scale.plan.trace import IN_FP32, REPLICAS, Key, Message, Segment, Sent, Trace, Work, is_product, links_of

# Of CUDA's caching allocator.
_ROUNDED_TO = 512
_PARTS: dict[type, str] = {
    BlockDiffusionTransformer: "embedding",
    Decoder: "residual",
    Block: "residual",
    Attention: "attention",
    MLP: "mlp",
    Mixture: "mixture",
    Router: "router",
    Experts: "experts",
    Norm: "norm",
    OutputLayer: "head",
}
_WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_consecutive"}
_NO_KERNEL = {
    *("_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided"),
    *("new_empty", "new_empty_strided", "set_", "resize_", "record_stream", "_pin_memory", "is_pinned"),
}


@dataclass
class _Stored:
    """A tensor's memory, from its birth on."""

    size: int
    kind: str
    in_model: bool


@dataclass
class _UnderWay:
    """A message that is begun and not waited for; `message` counts it alone."""

    work: Any
    key: Key
    message: Message


@dataclass
class _Place:
    """Where in the model the code is: the part, and the stretch of the timeline."""

    part: str
    segment: str


class Recorder(TorchDispatchMode):
    """Writes down memory, work, messages and waits of what runs inside it, by phase.

    Args:
        device_type: whose memory and work count.
        pairs: query-key pairs that the mask lets through in a micro-batch, by the number of a sequence's rows that ask:
            of the noisy ones, and of all.
    """

    def __init__(self, device_type: str, names_of_groups: dict[str, str], pairs: dict[int, int]) -> None:
        super().__init__()
        self._device, self._groups, self._pairs = device_type, names_of_groups, pairs
        self._phase = "engine"
        self._stored: dict[int, _Stored] = {}
        self._timeline: list[tuple[str, _Stored, int]] = []
        self._segment = "engine"
        self._stack: list[_Place] = []
        self._starts: list[int] = []
        self._places: list[_Place | None] = []
        self.work: dict[Key, Work] = {}
        self.messages: dict[Key, Message] = {}
        self.waits: Counter[str] = Counter()
        self.order: list[Sent] = []
        # By links, in the order in which these take them.
        self._under_way: dict[str, list[_UnderWay]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`."""
        before = self._phase, self._segment
        self._phase = self._segment = name
        yield
        self._phase, self._segment = before

    def enter_phase(self, name: str) -> None:
        """Count what follows, within the phase that is open, as `name`."""
        self._phase = self._segment = name

    # Where the code is.

    @contextmanager
    def following(self, chunks: list[Any]) -> Iterator[None]:
        """Know, inside, which part of `chunks` an operator belongs to."""
        segments = {id(module): name for chunk in chunks for module, name in _segments(chunk)}

        def enter(module: nn.Module, _: Any) -> None:
            part = _PARTS.get(type(module))
            if part is None:
                return
            around = self._place()
            self._stack.append(_Place(part, segments.get(id(module), around.segment if around else "between")))
            self._mark()

        def leave(module: nn.Module, *_: Any) -> None:
            if type(module) in _PARTS:
                self._stack.pop()
                self._mark()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        for chunk in chunks:
            handles += [p.register_post_accumulate_grad_hook(self._accumulated) for p in chunk.parameters()]
        yield
        for handle in handles:
            handle.remove()

    def _mark(self) -> None:
        number = torch._C._autograd._get_sequence_nr()
        place = self._stack[-1] if self._stack else None
        if self._starts and self._starts[-1] == number:
            self._places[-1] = place
        else:
            self._starts.append(number)
            self._places.append(place)

    def _accumulated(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self.label(parameter.grad, "gradients")

    def _place(self) -> _Place | None:
        """What the code computes or, in backward, is the derivative of."""
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return None
        index = bisect.bisect_right(self._starts, node._sequence_nr()) - 1
        return self._places[index] if index >= 0 else None

    def _here(self) -> tuple[str, str]:
        """Return part and direction of what runs now, and follow it on the timeline."""
        node = torch._C._current_autograd_node()
        if node is not None and node.name().endswith("AccumulateGrad"):
            return "gradients", "backward"
        place = self._place()
        if place is None:
            if node is None:
                self._enter("between")
            return "", ""
        # In backward, what is computed again saves its tensors through hooks of torch.utils.checkpoint. Whether
        # gradients are on says less: an autograd function turns them off for its forward.
        again = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        direction = "forward" if node is None else "recomputed" if again else "backward"
        self._enter(f"{place.segment} {'forward' if node is None else 'backward'}")
        return place.part, direction

    def _enter(self, segment: str) -> None:
        if self._phase == "gradients":
            self._segment = segment

    # What the code does.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in _WAITS and lies_on(args[0], self._device):
            self._waited(name)
        if name in ("_local_scalar_dense", "is_nonzero"):
            value = args[0]
            return 1.0 if value.dtype.is_floating_point else False if value.dtype == torch.bool else 0
        if name == "equal":
            return True
        if name == "_pin_memory":
            return args[0].clone()
        if name == "is_pinned":
            return True
        part, direction = self._here()
        out = func(*args, **kwargs)
        before = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        after = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in after:
            self._born(tensor, part)
        if func.namespace in ("c10d", "_c10d_functional"):
            self._sent(func, args, kwargs, out, before, part)
        elif not func.is_view and name not in _NO_KERNEL and func.namespace != "prim":
            self._worked(func, name, part, direction, args, kwargs, before, after)
        return out

    def _worked(
        self,
        func: Any,
        name: str,
        part: str,
        direction: str,
        args: Any,
        kwargs: Any,
        before: list[Tensor],
        after: list[Tensor],
    ) -> None:
        if not any(x.device.type == self._device for x in (*before, *after)):
            return
        if name == "_to_copy" and after[0].device != before[0].device and after[0].device.type == "cpu":
            self._waited("copy to the host")
        flops, shape = self._flops(name, args, before, after)
        if is_product(name) and args[1].dtype == torch.float32:
            name += IN_FP32
        # A size outside the model follows from how many layers there are, and would be a key of its own.
        key = Key(self._phase, part, direction, name, shape if part else "")
        moved = moved_bytes(func, args, kwargs, after, self._device)
        self.work.setdefault(key, Work()).add(flops, moved)
        for queue in self._under_way.values():
            for place, sent in enumerate(queue):
                sent.message.beside.add(flops, moved)
                # A link takes one message after the other.
                if place == 0:
                    sent.message.alone.add(flops, moved)

    def _flops(self, name: str, args: Any, before: list[Tensor], after: list[Tensor]) -> tuple[int, str]:
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            inner = args[1 if "add" in name else 0].shape[-1]
            out = after[0]
            return 2 * out.numel() * inner, "x".join(map(str, (*out.shape, inner)))
        if name == "_grouped_mm":
            # Rows [M, K] by the weights of their experts [e, K, N], or for the gradients of these [N, M] by [M, K].
            rows, other = args[:2]
            return 2 * rows.numel() * other.shape[-1], "x".join(map(str, (*rows.shape, *other.shape)))
        if name in ("block_attention", "block_attention_backward"):
            q = before[1] if name.endswith("backward") else before[0]
            a_pair = (10 if name.endswith("backward") else 4) * q.shape[3] * q.shape[2]
            return a_pair * self._pairs[q.shape[1]], str(q.shape[1])
        return 0, ""

    def _sent(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor], part: str) -> None:
        name = func._schema.name.partition("::")[2]
        group = next(
            dist.ProcessGroup.unbox(x)
            for x in pytree.tree_leaves((args, kwargs))
            if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())
        )
        ranks = tuple(dist.get_process_group_ranks(group))
        peer = ranks[args[2]] if name in ("send", "recv_") else None
        shapes = " ".join(f"{str(x.dtype)[6:]}{list(x.shape)}" for x in tensors)
        self.order.append(Sent(ranks, name, shapes, peer))
        for tensor in tensors:
            self.label(tensor, "messages" if peer is not None else "buckets", only_outside=True)
        size = max((x.numel() * x.element_size() for x in tensors), default=0)
        label = self._groups.get(group.group_name, f"{len(ranks)} ranks")
        if peer is not None:
            # Over whatever group: megatron-core takes that of all ranks, too, so that both directions are independent.
            label, ranks = "pipeline", tuple(sorted((peer, dist.get_rank())))
        early = peer is None and is_waited_for_later(func, args)
        # Between replicas gradients leave as backward passes by, cut as the number of layers has it.
        part = "" if label in REPLICAS else part
        shape = f"{ranks}" if peer is not None else str(size) if part else ""
        key = Key(self._phase, part, label, name, shape)
        message = Message(ranks, 1, size)
        if early:
            works = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.ScriptObject)]
            self._under_way.setdefault(links_of(label), []).append(_UnderWay(dist.Work.unbox(works[-1]), key, message))
        else:
            self._count_message(key, message)

    def _count_message(self, key: Key, message: Message) -> None:
        beside = message.beside
        if beside.calls:
            # Messages inside the model are counted together where they have as much beside them, for their size: what
            # one has too much would hide what another has too little.
            key = key._replace(
                shape=f"{key.shape} beside {beside.flops:.3g} {beside.bytes:.3g}" if key.part else "beside"
            )
        total = self.messages.setdefault(key, Message(message.ranks))
        total.add(message)

    def waited_for_message(self, work: Any) -> None:
        """Take a collective that was begun as done."""
        for queue in self._under_way.values():
            for sent in [sent for sent in queue if sent.work is work]:
                queue.remove(sent)
                self._count_message(sent.key, sent.message)

    def _waited(self, what: str) -> None:
        self.waits[f"{self._phase}: {what} at {_line()}"] += 1

    def waited(self, what: str) -> None:
        """Count a call of torch.cuda that waits for the device."""
        self._waited(what)

    # Memory.

    def _born(self, tensor: Tensor, part: str) -> None:
        if not isinstance(tensor, FakeTensor) or tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._stored:
            return
        size = -(-storage.nbytes() // _ROUNDED_TO) * _ROUNDED_TO
        if not size:
            return
        stored = self._stored[key] = _Stored(size, self._kind(part), bool(part))
        self._timeline.append((self._segment, stored, size))
        weakref.finalize(storage, self._died, key, stored)

    def _died(self, key: int, stored: _Stored) -> None:
        self._stored.pop(key, None)
        self._timeline.append((self._segment, stored, -stored.size))

    def _kind(self, part: str) -> str:
        if self._phase != "gradients":
            return {"engine": "buckets"}.get(self._phase, self._phase)
        kinds = {"": "buckets", "gradients": "gradients", "head": "head", "mixture": "routed", "experts": "routed"}
        return kinds.get(part, "activations")

    def label(self, tensor: Tensor, kind: str, *, only_outside: bool = False) -> None:
        """Count the memory of a tensor as `kind`, from its birth on; only_outside: unless the model made it."""
        stored = self._stored.get(tensor.untyped_storage()._cdata)
        if stored is not None and not (
            only_outside and (stored.in_model or stored.kind in ("weights", "optimizer", "gradients"))
        ):
            stored.kind = kind

    def begin(self) -> None:
        """Forget work, messages and waits so far, and what is no longer in memory."""
        self.work, self.messages, self.waits = {}, {}, Counter()
        self._timeline = [("before", stored, stored.size) for stored in self._stored.values()]

    def segments(self) -> list[Segment]:
        """Return memory since `begin`."""
        return list(_segments_of(self._timeline))

    def trace(self, micro_batches: int, flops: float) -> Trace:
        """Return what was written down since `begin`; work and messages that follow are not in it."""
        waits = {what: float(count) for what, count in self.waits.items()}
        return Trace(
            self.segments(), deepcopy(self.work), deepcopy(self.messages), waits, micro_batches, flops, order=self.order
        )


def _segments_of(timeline: list[tuple[str, _Stored, int]]) -> Iterator[Segment]:
    """The most that was in memory in each stretch, by kind; stretches of one name in a row are one."""
    live: Counter[str] = Counter()
    total, name, peak, at_peak = 0, "before", 0, Counter[str]()
    for segment, stored, size in timeline:
        if segment != name:
            yield Segment(name, dict(at_peak))
            name, peak, at_peak = segment, total, Counter(live)
        live[stored.kind] += size
        total += size
        if total > peak:
            peak, at_peak = total, Counter(live)
    yield Segment(name, dict(at_peak))


def _segments(chunk: Any) -> Iterator[tuple[nn.Module, str]]:
    """The stretches of a chunk's forward; layers between its first and last one are one, for each way to recompute."""
    yield chunk, f"chunk {chunk.vp_stage or 0}"
    layers = list(chunk.decoder.layers)
    kept = chunk.decoder.recompute_layers
    for index, layer in enumerate(layers):
        place = "first" if index == 0 else "last" if index == len(layers) - 1 else "middle"
        yield layer, f"chunk {chunk.vp_stage or 0} {place} layer{' recomputed' * (index < kept)}"
    if chunk.post_process:
        yield chunk.output_layer, "head"


def _line() -> str:
    """The innermost line of code outside torch."""
    import sys

    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if "torch" not in file.parts and file.parent.name != "plan":
            return f"{file.parent.name}/{file.name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
