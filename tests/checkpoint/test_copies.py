"""Check that a save copies what the tensors held when it began, although training changes them meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bd3_scale.checkpoint.saver import HostCopies


def updated(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.mul_(-1)


def test_copies_are_of_their_own() -> None:
    whole = torch.arange(24.0)
    tensors = [whole[:6].view(2, 3), whole[6:]]
    copies_of = HostCopies().of
    copies = copies_of(tensors)
    updated(tensors)
    assert [copy.flatten().tolist() for copy in copies] == [list(range(6)), list(range(6, 24))]
    again = copies_of(tensors)
    assert [copy.flatten().tolist() for copy in again] == [[-x for x in range(6)], [-x for x in range(6, 24)]]


@pytest.mark.gpu
def test_a_gpu_s_are_complete_and_take_the_memory_of_earlier_ones() -> None:
    size = 1 << 26
    tensors = [torch.zeros(size, device="cuda"), torch.zeros(3, device="cuda")]
    copies_of = HostCopies().of
    copies: list[Tensor] = []
    for step in range(1, 4):
        for _ in range(50):
            tensors[0].add_(1)
        tensors[1].add_(1)
        earlier = copies
        copies = copies_of(tensors)
        tensors[0].mul_(1)
        assert (copies[0] == 50 * step).all(), "the copy waits for the update"
        assert copies[1].tolist() == [step] * 3
        assert all(copy.is_pinned() for copy in copies)
        assert not earlier or all(a.data_ptr() == b.data_ptr() for a, b in zip(copies, earlier, strict=True))
    (shorter,) = copies_of(tensors[1:])
    assert shorter.tolist() == [3] * 3
