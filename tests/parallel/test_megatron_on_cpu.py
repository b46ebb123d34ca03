"""The patches that megatron-core needs on CPU: still needed by the installed version, and refused where CUDA is."""

from __future__ import annotations

import inspect

import pytest
import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import mappings

from bd3_scale.parallel import megatron_on_cpu


def test_refuses_where_cuda_is_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="must not be installed where CUDA"):
        megatron_on_cpu.install()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")
def test_what_is_patched_is_there_and_lands_on_the_cpu():
    assert 'torch.zeros([], dtype=torch.int, device="cuda")' in inspect.getsource(schedules)
    assert "torch.cuda.current_device()" in inspect.getsource(mappings)
    megatron_on_cpu.install()
    megatron_on_cpu.install()
    assert schedules.torch.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
    assert schedules.torch.float32 is torch.float32
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
