"""Check that weights that several ranks hold are equal on all of them.

A bit that flips in one rank's memory, or a faulty collective, makes replicas drift apart, and training goes on with
wrong weights. ZeRO 1 and 2 send data-parallel ranks their weights anew after each step, so a difference there arose
since that step or in the sending. A flipped bit in a master weight, of which there is one copy, reaches all ranks and
cannot be seen here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bd3_scale.model.layout import ParameterLayout
from bd3_scale.parallel.collective import any_rank, gather_values
from bd3_scale.parallel.groups import ProcessGroups

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_CHUNK = 1 << 22
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)


class ReplicasDifferError(ValueError):
    """Ranks hold different values of a weight that they share."""


def fingerprint(tensor: Tensor) -> Tensor:
    """Return a 64-bit fingerprint of a tensor, int64 []: Σ bits[i] · (2i·φ + 1) mod 2^64.

    The factors are odd and so invertible mod 2^64: a change of any one element changes the fingerprint. They differ
    from element to element, so an exchange of elements is seen as well. An integer sum does not depend on the order in
    which a GPU adds.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        index = torch.arange(start, start + len(chunk), device=flat.device)
        total += (chunk * (2 * index * _ODD + 1)).sum()
    return total


def check_replicas(
    chunks: Sequence[nn.Module], layouts: Sequence[ParameterLayout], groups: ProcessGroups, step: int
) -> None:
    """Compare the weights that ranks share (collective).

    Compared are data- and context-parallel ranks, unless ZeRO-3 divides the weights among them; tensor-parallel ranks
    that hold a weight whole; and the stages that hold a tied embedding.

    ReplicasDifferError, on all ranks: the message names the parameter and the ranks whose copy differs from most.
    """
    prints = torch.stack([fingerprint(_held(layout.parameter)) for layout in layouts])
    of_parameter = {id(layout.parameter): index for index, layout in enumerate(layouts)}
    divided = any(hasattr(layout.parameter, "ds_tensor") for layout in layouts)
    whole = [i for i, layout in enumerate(layouts) if not getattr(layout.parameter, "tensor_model_parallel", False)]
    tied = [of_parameter[id(weight)] for chunk in chunks if (weight := getattr(chunk, "tied_weight", None)) is not None]
    spread = [i for i, layout in enumerate(layouts) if not getattr(layout.parameter, "allreduce", True)]
    # ZeRO-3 divides parameters, but not buffers, which no gradient changes.
    others = [i for i, layout in enumerate(layouts) if i not in spread and not (divided and layout.is_trained)]
    shared = [(others, groups.dp_cp), (spread, groups.expt_dp), (whole, groups.tp)]
    shared += [(tied, groups.embd)] if tied else []
    differ = [index for indices, group in shared for index in _different(prints, indices, group)]
    if any_rank(bool(differ)):
        raise ReplicasDifferError(
            f"after step {step} ranks that share weights hold different ones: {_describe(layouts, prints, differ)}. "
            "A processor, memory or network is faulty, or a collective is wrong: look for a faulty node, and resume "
            "from an earlier checkpoint"
        )


def _held(parameter: Tensor) -> Tensor:
    """Return the part of a weight that this rank keeps; all of it except with ZeRO-3."""
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part.data


def _different(prints: Tensor, indices: Sequence[int], group: dist.ProcessGroup) -> list[int]:
    """Return those of `indices` whose fingerprints are not equal on all ranks of `group`."""
    if group.size() == 1 or not indices:
        return []
    local = prints[torch.tensor(indices, device=prints.device)]
    # One all-reduce gives minimum and maximum: the maximum of x is the complement of the minimum of ~x.
    both = torch.stack([local, ~local])
    dist.all_reduce(both, op=dist.ReduceOp.MIN, group=group)
    return [
        index for index, low, high in zip(indices, both[0].tolist(), (~both[1]).tolist(), strict=True) if low != high
    ]


def _describe(layouts: Sequence[ParameterLayout], prints: Tensor, differ: Sequence[int]) -> str:
    """Return which ranks differ from most, for each parameter by its place in the whole model (collective)."""
    local = {}
    for index in differ:
        piece = layouts[index].pieces[0]
        local[f"{piece.key} at {list(piece.offset)}"] = int(prints[index])
    holders: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, prints_of_rank in enumerate(gather_values(local)):
        for name, value in prints_of_rank.items():
            holders[name][rank] = value
    parts = []
    for name, values in list(holders.items())[:3]:
        most = Counter(values.values()).most_common(1)[0][0]
        parts.append(f"{name}: rank {', '.join(str(rank) for rank, value in values.items() if value != most)}")
    more = f" and {len(holders) - 3} others" if len(holders) > 3 else ""
    return "; ".join(parts) + more
