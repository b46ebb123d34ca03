"""Check that backends from outside the package work through the same two functions as its own."""

from __future__ import annotations

import types

import pytest
import torch

from bd3_scale.attention import cpu
from bd3_scale.attention.backends import KernelBackend, choose_backend
from bd3_scale.attention.dispatch import block_attention, decode_attention
from bd3_scale.registry import attention_backends
from tests.attention import plain_backend
from tests.attention.cases import Problem, assert_close, outputs_and_gradients

TRAINING = Problem([[7, 19, 3, 11], [21, 19]], [4, 8], None, 1, True, True, 4, 2, 16, 0)
called: list[str] = []


def told(name: str):
    def function(*arguments):
        called.append(name)
        return getattr(cpu, name)(*arguments)

    return function


@attention_backends.register("test_told")
class Told(KernelBackend):
    """A backend with the kernels for CPU, which record when they run."""

    name = "test_told"

    def kernels(self):
        return types.SimpleNamespace(forward=told("forward"), backward=told("backward"), decode=told("decode"))


@pytest.mark.parametrize(
    "problem",
    [
        TRAINING,
        TRAINING._replace(num_noisy=2),
        TRAINING._replace(clean_queries=False),
        TRAINING._replace(num_noisy=0),
        TRAINING._replace(documents=[[40]] * 2, block_sizes=[40] * 2, clean_queries=False, clean_stream=False),
    ],
)
def test_a_backend_from_outside_attends_and_is_differentiated(problem: Problem) -> None:
    want = outputs_and_gradients(problem, torch.float64, "reference")
    assert_close(outputs_and_gradients(problem, torch.float64, plain_backend.NAME), want, 1e-12)


def test_a_backend_from_outside_decodes() -> None:
    q, k, v = (torch.randn(2, rows, heads, 16, dtype=torch.float64) for rows, heads in ((5, 4), (30, 2), (30, 2)))
    for lengths in (None, torch.tensor([30, 7])):
        got = decode_attention(q, k, v, lengths=lengths, backend=plain_backend.NAME)
        assert_close([got], [decode_attention(q, k, v, lengths=lengths, backend="reference")], 1e-12)


def test_kernels_from_outside_are_called_as_operators_which_torch_compiles() -> None:
    called.clear()
    got = outputs_and_gradients(TRAINING, torch.float32, "test_told")
    assert called == ["forward", "backward"]
    assert all(map(torch.equal, got, outputs_and_gradients(TRAINING, torch.float32, "cpu")))
    *qkv, _ = TRAINING.tensors(torch.float32)
    decode_attention(*(x[:, :8] for x in qkv), backend="test_told")
    assert called[2:] == ["decode"]
    compiled = torch.compile(lambda *x: block_attention(*x, backend="test_told"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*qkv, TRAINING.spans()), got[0])
    assert called[3:] == ["forward"]


def test_a_backend_from_outside_says_what_it_cannot_take() -> None:
    cpu_device = torch.device("cpu")
    assert choose_backend(plain_backend.NAME, cpu_device, torch.float32, 64) == plain_backend.NAME
    with pytest.raises(ValueError, match=r"'test_plain' cannot run: .* not 1024; 'auto' takes"):
        choose_backend(plain_backend.NAME, cpu_device, torch.float32, 1024)
