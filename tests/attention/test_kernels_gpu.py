"""Check the kernels on a GPU: errors compared with FlexAttention's, reproducibility, shapes of the property tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_scale.attention.dispatch import block_attention, decode_attention
from tests.attention.cases import Problem, errors, outputs_and_gradients, problems

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
# Relative to the result's norm: a few roundings of the inputs' precision.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def restore_determinism() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()  # FlexAttention is compiled for the shapes of one test alone


def results(problem: Problem, dtype: torch.dtype, backend: str, *, deterministic: bool = True) -> list[Tensor]:
    torch.use_deterministic_algorithms(deterministic)
    return outputs_and_gradients(problem, dtype, backend, device="cuda")


def large(**changes: object) -> Problem:
    problem = Problem([[700, 324], [1024]], [16, 16], None, 1, True, True, 8, 2, 128, 0)
    return problem._replace(**changes)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    problems(max_len=300),
    st.sampled_from([16, 32, 64, 128, 256]),
    st.sampled_from(sorted(TOLERANCE, key=str)),
    st.booleans(),
)
def test_any_problem(problem: Problem, head_dim: int, dtype: torch.dtype, deterministic: bool) -> None:
    if dtype == torch.float32:
        head_dim = min(head_dim, 128)
    problem = problem._replace(head_dim=head_dim)
    want = results(problem, torch.float64, "reference")
    for name, error in errors(results(problem, dtype, "triton", deterministic=deterministic), want).items():
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fused"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("block_size", [1, 4, 16, 300, 1024])
def test_bfloat16_errs_at_most_twice_as_much_as_flexattention(
    block_size: int, head_dim: int, deterministic: bool
) -> None:
    problem = large(block_sizes=[block_size] * 2, head_dim=head_dim)
    want = results(problem, torch.float64, "reference")
    ours = errors(results(problem, torch.bfloat16, "triton", deterministic=deterministic), want)
    rival = errors(results(problem, torch.bfloat16, "flex", deterministic=False), want)
    for name in ours:
        assert ours[name] <= 2 * rival[name], f"{name}: {ours[name]:.1e}, FlexAttention {rival[name]:.1e}"


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_deterministic_backward_is_bitwise_reproducible(head_dim: int) -> None:
    problem = large(head_dim=head_dim, num_noisy=2)
    first = results(problem, torch.bfloat16, "triton")
    for _ in range(20):
        again = results(problem, torch.bfloat16, "triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("lengths", [None, [4096, 1], [0, 33]])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decode(head_dim: int, lengths: list[int] | None) -> None:
    q = torch.randn(2, 16, 32, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 4096, 8, head_dim, device="cuda", dtype=torch.bfloat16)
    given_lengths = None if lengths is None else torch.tensor(lengths, device="cuda")
    got = decode_attention(q, k, v, lengths=given_lengths, backend="triton")
    want = decode_attention(q.double(), k.double(), v.double(), lengths=given_lengths, backend="reference")
    assert float((got.double() - want).norm()) <= 1e-2 * float(want.norm())


def test_compiled_and_eager_agree() -> None:
    problem = large()
    spans = problem.spans().cuda()
    q, k, v, _ = (x.cuda() for x in problem.tensors(torch.bfloat16))
    torch.use_deterministic_algorithms(True)
    compiled = torch.compile(lambda *x: 2 * block_attention(*x, spans, backend="triton"), fullgraph=True)
    assert torch.equal(compiled(q, k, v), 2 * block_attention(q, k, v, spans, backend="triton"))


RAGGED = large(documents=[[77, 120], [197]], block_sizes=[7, 7], heads=4)


def exercise(problem: Problem, dtype: torch.dtype) -> None:
    """Run both backward passes, and decoding."""
    for deterministic in (True, False):
        results(problem, dtype, "triton", deterministic=deterministic)
    q, k, v, _ = (x.cuda() for x in problem.tensors(dtype))
    for lengths in (None, torch.full((len(q),), 33, device="cuda")):
        decode_attention(q[:, :5], k, v, lengths=lengths, backend="triton")
    torch.cuda.synchronize()


def exercise_one_form() -> None:
    """Run one form; `compute-sanitizer` checks this where there is only a minute."""
    exercise(RAGGED, torch.bfloat16)


def exercise_every_kernel() -> None:
    """Run ragged shapes of every form; `compute-sanitizer` checks this."""
    forms = [
        *(RAGGED._replace(head_dim=head_dim) for head_dim in (64, 128, 256)),
        RAGGED._replace(num_noisy=2),
        RAGGED._replace(clean_queries=False),
        RAGGED._replace(documents=[[203]], block_sizes=[7], ranges=[(7, 77), (140, 203)]),
        RAGGED._replace(documents=[[1030]], block_sizes=[1000]),
    ]
    for problem, dtype in [*((form, torch.bfloat16) for form in forms), (forms[0], torch.float32)]:
        exercise(problem, dtype)


def sanitized(sanitizer: str, tool: str, function: str, room: str = "attention") -> dict[str, Any]:
    """Return arguments of `subprocess.run` that run a function of a test file under a tool of `compute-sanitizer`."""
    code = f"from tests.{room}.test_kernels_gpu import {function}; {function}()"
    return {
        "args": [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code],
        "cwd": Path(__file__).parents[2],
        # The sanitizer does not see the bounds of pieces of PyTorch's large segments.
        "env": {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        "text": True,
    }


def found_nothing(said: str) -> bool:
    """Return whether the summary's first number is zero; racecheck lists errors and warnings after its hazards."""
    return re.search(r"SUMMARY: 0 (errors|hazards)\b", said) is not None


@pytest.mark.parametrize("room", ["attention", "fused"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_is_clean(tool: str, room: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    watched = sanitized(sanitizer, tool, "exercise_every_kernel", room)
    done = subprocess.run(**watched, capture_output=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert found_nothing(done.stdout), done.stdout[-2000:]
