"""Check, as one of two ranks, that errors and flags of one rank reach both."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from bd3_scale.parallel.collective import (
    any_rank,
    gather_tensors,
    gather_values,
    largest,
    on_first_of_node,
    on_rank_zero,
)
from bd3_scale.parallel.groups import process_groups
from bd3_scale.recipe.schema import ParallelRecipe


def fail() -> None:
    raise OSError("rank 0 found the disk full")


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 found nothing")


def agree() -> None:
    with process_groups(ParallelRecipe(tensor=2)) as groups:
        rank = dist.get_rank()
        assert on_rank_zero(lambda: f"from rank {dist.get_rank()}") == "from rank 0"
        with pytest.raises(OSError, match="rank 0 found the disk full"):
            on_rank_zero(fail)
        assert on_first_of_node(lambda: f"from rank {dist.get_rank()}") == "from rank 0"
        with pytest.raises(OSError, match="rank 0 found the disk full"):
            on_first_of_node(fail)
        with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "1"}):  # as if each had a node
            assert on_first_of_node(lambda: f"from rank {dist.get_rank()}") == f"from rank {rank}"
            with pytest.raises(ValueError, match="rank 1 found"):
                on_first_of_node(fail_on_rank_one)
        assert any_rank(rank == 1)
        assert not any_rank(False)
        assert largest(rank, 0.25 - rank, rank == 0, -1) == [1, 0.25, 1, -1]
        assert gather_values({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
        assert gather_values(rank, groups.dp_cp) == [rank]
        for size in (rank, 0, 3 - rank):  # sizes that differ from the other rank's, and none
            mine = torch.full((2, size), rank / 3, dtype=torch.float64)
            found = gather_tensors(mine)
            assert [len(each) for each in found] == [2, 2]
            assert torch.equal(found[rank], mine)
            assert found[1 - rank].unique().tolist() in ([], [(1 - rank) / 3])
        with pytest.raises(AssertionError, match="tuples"):
            gather_values((1, 2))
        missing = Path("nowhere", "at all")
        with pytest.raises(FileNotFoundError, match=str(missing)):
            on_rank_zero(missing.read_text)
