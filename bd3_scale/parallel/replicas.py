"""Whether weights that several ranks hold are the same on all of them.

A bit that flips in one rank's memory, or a collective that lost something, makes replicas drift apart; training goes on
and is wrong. ZeRO 1 and 2 hand data-parallel ranks their weights anew after each step: what differs there came since,
or in that handing out, and a flipped bit of the one master that there is reaches all of them and is not seen.
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
    """64 bits of a tensor, int64 []: Σ bits[i]·(2i·φ + 1) mod 2^64, which a change of any one element changes."""
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        places = torch.arange(start, start + len(chunk), device=flat.device)
        total += (chunk * (2 * places * _ODD + 1)).sum()
    return total


def check_replicas(
    chunks: Sequence[nn.Module], layouts: Sequence[ParameterLayout], groups: ProcessGroups, step: int
) -> None:
    """Compare the weights that ranks share (collective): over data- and context-parallel ranks unless ZeRO-3 divides
    them, over tensor-parallel ranks where these hold a weight whole, and over the stages that tie embeddings.

    ReplicasDifferError, on all ranks: the parameter, and the ranks whose copy is not that of most.
    """
    prints = torch.stack([fingerprint(_held(layout.parameter)) for layout in layouts])
    of_parameter = {id(layout.parameter): place for place, layout in enumerate(layouts)}
    divided = any(hasattr(layout.parameter, "ds_tensor") for layout in layouts)
    whole = [i for i, layout in enumerate(layouts) if not getattr(layout.parameter, "tensor_model_parallel", False)]
    tied = [of_parameter[id(weight)] for chunk in chunks if (weight := getattr(chunk, "tied_weight", None)) is not None]
    spread = [i for i, layout in enumerate(layouts) if not getattr(layout.parameter, "allreduce", True)]
    # ZeRO-3 divides parameters, and leaves what no gradient changes whole.
    others = [i for i, layout in enumerate(layouts) if i not in spread and not (divided and layout.is_trained)]
    shared = [(others, groups.dp_cp), (spread, groups.expt_dp), (whole, groups.tp)]
    shared += [(tied, groups.embd)] if tied else []
    differ = [place for places, group in shared for place in _different(prints, places, group)]
    if any_rank(bool(differ)):
        raise ReplicasDifferError(
            f"after step {step} ranks that share weights hold different ones: {_describe(layouts, prints, differ)}. "
            "A processor, memory or network fails, or a collective is wrong: look for a bad node, and go on from a "
            "checkpoint before it"
        )


def _held(parameter: Tensor) -> Tensor:
    """What this rank keeps of a weight; ZeRO-3 leaves it a part."""
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part.data


def _different(prints: Tensor, places: Sequence[int], group: dist.ProcessGroup) -> list[int]:
    """Those of `places` whose prints are not the same on all ranks of `group`."""
    if group.size() == 1 or not places:
        return []
    mine = prints[torch.tensor(places, device=prints.device)]
    # The least of x and the least of ~x, which is the greatest of x.
    both = torch.stack([mine, ~mine])
    dist.all_reduce(both, op=dist.ReduceOp.MIN, group=group)
    return [
        place for place, low, high in zip(places, both[0].tolist(), (~both[1]).tolist(), strict=True) if low != high
    ]


def _describe(layouts: Sequence[ParameterLayout], prints: Tensor, differ: Sequence[int]) -> str:
    """Who holds what, by where a parameter lies in the whole model (collective)."""
    mine = {}
    for place in differ:
        piece = layouts[place].pieces[0]
        mine[f"{piece.key} at {list(piece.offset)}"] = int(prints[place])
    holders: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, prints_of_rank in enumerate(gather_values(mine)):
        for name, value in prints_of_rank.items():
            holders[name][rank] = value
    parts = []
    for name, values in list(holders.items())[:3]:
        most = Counter(values.values()).most_common(1)[0][0]
        parts.append(f"{name}: rank {', '.join(str(rank) for rank, value in values.items() if value != most)}")
    more = f" and {len(holders) - 3} others" if len(holders) > 3 else ""
    return "; ".join(parts) + more
