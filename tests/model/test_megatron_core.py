"""Check which modules a start imports, and that megatron-core's fused functions are still compiled."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch._dynamo", "torch._inductor", "transformers", "wandb")


@pytest.mark.launch
@pytest.mark.parametrize("module", ["bd3_scale.train.main", "bd3_scale.generate.text", "bd3_scale.parallel.engine"])
def test_a_start_imports_neither_a_compiler_nor_what_only_some_runs_need(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout == "[]\n"


COMPILED = """
import bd3_scale.model, torch, wandb
assert wandb.__name__ == "wandb"
from megatron.core.fusions.fused_bias_swiglu import swiglu

made, compile_now = [], torch.compile
def eager(function, **options):
    made.append(function.__name__)
    return compile_now(function, backend="eager", **options)
torch.compile = eager
x = torch.randn(3, 8)
gate, up = x.chunk(2, -1)
for _ in range(2):
    torch.testing.assert_close(swiglu(x), torch.nn.functional.silu(gate) * up)
print(made)
# Inside another compiled function it is part of that one.
whole = compile_now(lambda x: swiglu(x) * 2, backend="eager", fullgraph=True)
torch.testing.assert_close(whole(x), torch.nn.functional.silu(gate) * up * 2)
print(made)
"""


@pytest.mark.launch
def test_a_fused_function_is_compiled_once_at_its_first_call() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout == "['swiglu']\n" * 2, done.stderr
