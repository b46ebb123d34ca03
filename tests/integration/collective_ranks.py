"""One of two ranks: errors and flags that one rank sees reach both."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from bd3_scale.parallel.collective import any_rank, gather_objects, on_rank_zero
from bd3_scale.parallel.groups import process_groups
from bd3_scale.recipe.schema import ParallelRecipe


def fail() -> None:
    raise OSError("rank 0 found the disk full")


def agree() -> None:
    with process_groups(ParallelRecipe(tensor=2)) as groups:
        rank = dist.get_rank()
        assert on_rank_zero(lambda: f"from rank {dist.get_rank()}") == "from rank 0"
        with pytest.raises(OSError, match="rank 0 found the disk full"):
            on_rank_zero(fail)
        assert any_rank(rank == 1)
        assert not any_rank(False)
        assert gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
        assert gather_objects(rank, groups.dp_cp) == [rank]
