"""Record what one rank asks of its device, while its code runs on fake tensors.

Each operator is counted under a part of the model. In forward that is the module whose code runs. In backward no module
runs: autograd gives each node the sequence number of its forward operator, and the module that ran at that number is
the part.
"""

from __future__ import annotations

import bisect
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
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from bd3_scale.model.block import MLP, Attention, Block, Norm
from bd3_scale.model.decoder import Decoder
from bd3_scale.model.experts import Experts
from bd3_scale.model.head import OutputLayer
from bd3_scale.model.mixture import Mixture
from bd3_scale.model.router import Router
from bd3_scale.model.transformer import BlockDiffusionTransformer
from bd3_scale.plan.operators import flops_and_shape, is_waited_for_later, lies_on, moved_bytes
from bd3_scale.plan.timeline import Timeline
from bd3_scale.plan.trace import IN_FP32, REPLICAS, Key, Message, Segment, Sent, Trace, Work, is_product, links_of

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
# Operators that return a number or a shape that only the device knows: the host waits for it.
_WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_consecutive"}
# Operators that launch no kernel.
_NO_KERNEL = {
    *("_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided"),
    *("new_empty", "new_empty_strided", "set_", "resize_", "record_stream", "_pin_memory", "is_pinned"),
}


@dataclass
class _Pending:
    """An asynchronous message that was started and not yet waited for; `message` counts only this one."""

    work: Any
    key: Key
    message: Message


@dataclass
class _Location:
    """The place in the model that the code has reached: the part, and the segment of the timeline."""

    part: str
    segment: str


class Recorder(TorchDispatchMode):
    """A dispatch mode that records memory, work, messages and waits of the code that runs inside it, by phase.

    Args:
        device_type: the type of device whose memory and work count.
        names_of_groups: what each process group is for, by its name in torch.distributed.
        pairs: query-key pairs that the mask allows in a micro-batch, by the number of query rows of a sequence: for the
            noisy rows, and for all rows. Fake tensors have no values, so the mask cannot be counted here.
    """

    def __init__(self, device_type: str, names_of_groups: dict[str, str], pairs: dict[int, int]) -> None:
        super().__init__()
        self._device, self._groups, self._pairs = device_type, names_of_groups, pairs
        self._phase = "engine"
        self._timeline = Timeline(device_type)
        self._stack: list[_Location] = []
        # Sequence numbers of autograd at which the location changed, and the locations from there on.
        self._starts: list[int] = []
        self._locations: list[_Location | None] = []
        self.work: dict[Key, Work] = {}
        self.messages: dict[Key, Message] = {}
        self.waits: Counter[str] = Counter()
        self.order: list[Sent] = []
        # By the links that they go over, in the order in which they were started.
        self._pending: dict[str, list[_Pending]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside under the phase `name`."""
        before = self._phase, self._timeline.segment
        self._phase = self._timeline.segment = name
        yield
        self._phase, self._timeline.segment = before

    def enter_phase(self, name: str) -> None:
        """Count what follows, until the present phase ends, under the phase `name`."""
        self._phase = self._timeline.segment = name

    # Where in the model the code is.

    @contextmanager
    def following(self, chunks: list[Any]) -> Iterator[None]:
        """Follow, inside, the modules of `chunks`, so that operators are counted under their parts."""
        segments = {id(module): name for chunk in chunks for module, name in _segments(chunk)}

        def enter(module: nn.Module, _: Any) -> None:
            part = _PARTS.get(type(module))
            if part is None:
                return
            around = self._location()
            self._stack.append(_Location(part, segments.get(id(module), around.segment if around else "between")))
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
        location = self._stack[-1] if self._stack else None
        if self._starts and self._starts[-1] == number:
            self._locations[-1] = location
        else:
            self._starts.append(number)
            self._locations.append(location)

    def _accumulated(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self._timeline.label(parameter.grad, "gradients")

    def _location(self) -> _Location | None:
        """Return where the code is; in backward where the forward operator was whose derivative it computes."""
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return None
        index = bisect.bisect_right(self._starts, node._sequence_nr()) - 1
        return self._locations[index] if index >= 0 else None

    def _here(self) -> tuple[str, str]:
        """Return part and direction of the operator that runs now, and set the segment of the timeline."""
        node = torch._C._current_autograd_node()
        if node is not None and node.name().endswith("AccumulateGrad"):
            return "gradients", "backward"
        location = self._location()
        if location is None:
            if node is None:
                self._enter("between")
            return "", ""
        # A recomputation in backward is recognised by the saved-tensor hooks of torch.utils.checkpoint. Whether
        # gradients are enabled does not tell: an autograd function disables them for its forward.
        again = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        direction = "forward" if node is None else "recomputed" if again else "backward"
        self._enter(f"{location.segment} {'forward' if node is None else 'backward'}")
        return location.part, direction

    def _enter(self, segment: str) -> None:
        if self._phase == "gradients":
            self._timeline.segment = segment

    # Operators and messages.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in _WAITS and lies_on(args[0], self._device):
            self._waited(name)
        # Fake tensors have no values. These answers let the training code go on its usual way: 1.0 is a finite norm,
        # and no flag is set.
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
            self._timeline.add(tensor, self._category(part), in_model=bool(part))
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
        flops, shape = flops_and_shape(name, args, before, after, self._pairs)
        if is_product(name) and args[1].dtype == torch.float32:
            name += IN_FP32
        # Outside the model sizes depend on the number of layers. Without the shape, traces of models with different
        # numbers of layers have the same keys and can be combined.
        key = Key(self._phase, part, direction, name, shape if part else "")
        moved = moved_bytes(func, args, kwargs, after, self._device)
        self.work.setdefault(key, Work()).add(flops, moved)
        for queue in self._pending.values():
            for index, sent in enumerate(queue):
                sent.message.overlapped.add(flops, moved)
                # A link takes one message after the other: only the oldest one is on its way.
                if index == 0:
                    sent.message.exclusive.add(flops, moved)

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
            self._timeline.label(tensor, "messages" if peer is not None else "buckets", only_outside=True)
        size = max((x.numel() * x.element_size() for x in tensors), default=0)
        label = self._groups.get(group.group_name, f"{len(ranks)} ranks")
        if peer is not None:
            # For any group: megatron-core also uses the group of all ranks, to keep both directions independent.
            label, ranks = "pipeline", tuple(sorted((peer, dist.get_rank())))
        early = peer is None and is_waited_for_later(func, args)
        # Gradients between replicas are cut into messages by layers, whose number differs between traces: no part.
        part = "" if label in REPLICAS else part
        shape = f"{ranks}" if peer is not None else str(size) if part else ""
        key = Key(self._phase, part, label, name, shape)
        message = Message(ranks, 1, size)
        if early:
            works = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.ScriptObject)]
            self._pending.setdefault(links_of(label), []).append(_Pending(dist.Work.unbox(works[-1]), key, message))
        else:
            self._count_message(key, message)

    def _count_message(self, key: Key, message: Message) -> None:
        overlapped = message.overlapped
        if overlapped.calls:
            # Messages inside the model are added up only if they overlap with equal work. Otherwise the surplus of one
            # would seem to hide another that has too little work to overlap with.
            key = key._replace(
                shape=f"{key.shape} overlapping {overlapped.flops:.3g} {overlapped.bytes:.3g}"
                if key.part
                else "overlapping"
            )
        total = self.messages.setdefault(key, Message(message.ranks))
        total.add(message)

    def waited_for_message(self, work: Any) -> None:
        """Count a pending message as finished."""
        for queue in self._pending.values():
            for sent in [sent for sent in queue if sent.work is work]:
                queue.remove(sent)
                self._count_message(sent.key, sent.message)

    def _waited(self, what: str) -> None:
        self.waits[f"{self._phase}: {what} at {_line()}"] += 1

    def waited(self, what: str) -> None:
        """Count a call of torch.cuda by which the host waits for the device."""
        self._waited(what)

    # Memory.

    def _category(self, part: str) -> str:
        """Return what the memory of a tensor counts as that a part of the model allocates."""
        if self._phase != "gradients":
            return {"engine": "buckets"}.get(self._phase, self._phase)
        categories = {"": "buckets", "gradients": "gradients", "head": "head", "mixture": "routed", "experts": "routed"}
        return categories.get(part, "activations")

    def label(self, tensor: Tensor, category: str) -> None:
        """Count the memory of a tensor as `category`, from its allocation on."""
        self._timeline.label(tensor, category)

    def begin(self) -> None:
        """Forget work, messages and waits so far, and what is no longer in memory."""
        self.work, self.messages, self.waits = {}, {}, Counter()
        self._timeline.begin()

    def segments(self) -> list[Segment]:
        """Return the peaks of memory since `begin`."""
        return self._timeline.segments()

    def trace(self, micro_batches: int, flops: float) -> Trace:
        """Return what was recorded since `begin`; it does not change with later work and messages."""
        waits = {what: float(count) for what, count in self.waits.items()}
        return Trace(
            self.segments(), deepcopy(self.work), deepcopy(self.messages), waits, micro_batches, flops, order=self.order
        )


def _segments(chunk: Any) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules of a chunk whose forward is a segment, with its name.

    Layers between the first and the last share a name, one for layers that are recomputed and one for others, so that
    traces of models with different numbers of layers have the same segments.
    """
    yield chunk, f"chunk {chunk.vp_stage or 0}"
    layers = list(chunk.decoder.layers)
    recomputed = chunk.decoder.recompute_layers
    for index, layer in enumerate(layers):
        position = "first" if index == 0 else "last" if index == len(layers) - 1 else "middle"
        yield layer, f"chunk {chunk.vp_stage or 0} {position} layer{' recomputed' * (index < recomputed)}"
    if chunk.post_process:
        yield chunk.output_layer, "head"


def _line() -> str:
    """Return the innermost line of code outside of torch and of this package."""
    import sys

    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if "torch" not in file.parts and file.parent.name != "plan":
            return f"{file.parent.name}/{file.name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
