"""Check that the installed megatron-core still needs its patches on CPU, and that CUDA refuses them."""

from __future__ import annotations

import inspect

import pytest
import torch
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.tensor_parallel import layers, mappings

from bd3_scale.parallel import megatron_on_cpu


def test_refuses_where_cuda_is_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="must not be installed where CUDA"):
        megatron_on_cpu.install()


def test_schedules_count_tokens_on_the_device_cuda_and_name_it_nowhere_else():
    """Check that each of the three schedules calls `torch.zeros` once; autocast takes a type and is not used on CPU."""
    counting = 'torch.zeros([], dtype=torch.int, device="cuda")'
    everywhere = inspect.getsource(schedules)
    assert everywhere.count(counting) == 3
    assert everywhere.count('"cuda"') == 3 + everywhere.count('torch.autocast("cuda"')
    assert "'cuda'" not in everywhere
    assert "torch.cuda." not in everywhere
    for schedule in (
        schedules.forward_backward_no_pipelining,
        schedules.forward_backward_pipelining_with_interleaving,
        schedules.forward_backward_pipelining_without_interleaving,
    ):
        assert inspect.getsource(schedule).count(counting) == 1


@pytest.mark.parametrize("module", [layers, mappings, p2p_communication])
def test_messages_are_allocated_on_the_current_cuda_device_and_no_literal_one(module):
    source = inspect.getsource(module)
    assert "device=torch.cuda.current_device()" in source
    assert "device='cuda" not in source
    assert 'device="cuda' not in source


@pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")
def test_what_is_patched_lands_on_the_cpu():
    megatron_on_cpu.install()
    patched = schedules.torch
    megatron_on_cpu.install()
    assert schedules.torch is patched
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    zero = schedules.torch.zeros([], dtype=torch.int, device="cuda")
    assert (zero.device.type, zero.dtype, zero.shape) == ("cpu", torch.int, ())
    assert schedules.torch.zeros(2, 3, device="meta").device.type == "meta"
    assert schedules.torch.zeros(2, 3).shape == (2, 3)
    assert schedules.torch.float32 is torch.float32
