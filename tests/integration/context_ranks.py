"""Count, as one of two context-parallel ranks, the bytes that a forward and a backward move between the ranks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from bd3_scale.parallel.groups import process_groups
from tests.integration import cases
from tests.integration.parity_ranks import micro_batches


class Collectives(TorchDispatchMode):
    """Bytes of each kind of collective: the size of what all ranks together hold before or after it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            whole = max((x for x in args if isinstance(x, torch.Tensor)), key=torch.Tensor.numel)
            name = func._schema.name.removeprefix("c10d::")
            self.bytes[name] = self.bytes.get(name, 0) + whole.numel() * whole.element_size()
        return func(*args, **(kwargs or {}))


def count_bytes(case: str, out: Path) -> None:
    layout = cases.Layout(dist_size := 2, case, {"context": dist_size})
    with process_groups(cases.recipe(layout).parallel) as groups:
        (model,) = cases.build(cases.recipe(layout), groups)
        inputs = micro_batches(cases.CASES[case], 0, groups)[0]
        with Collectives() as forward:
            loss, _ = model(inputs)
        with Collectives() as backward:
            loss.backward()
        if dist.get_rank() == 0:
            torch.save({"forward": forward.bytes, "backward": backward.bytes}, out)
