"""Compile the kernels for GPUs that this machine does not have.

`make test` compiles each kernel's most common form for one GPU, and for the others only kernels that sum over rows.
`make test-all` compiles all forms.
"""

from __future__ import annotations

import pytest
import torch

from bd3_scale.fused import kernels
from bd3_scale.fused.kernels.offline import Variant, compile_variant, variants
from bd3_scale.fused.ops import TRAFFIC, WIDEST_NORM
from bd3_scale.offline import SHARED_MEMORY, Usage
from tests.support.compiled import compiled

pytestmark = pytest.mark.launch

CHIPS = (80, 90, 100)
ADDS_UP = ("add_rms_norm_backward", "qkv_heads_backward")
# A multiprocessor has 65,536 registers: two programs of eight warps, or as many threads of others, run at once.
MOST_REGISTERS = 128
# Bytes a thread for spilled registers; only the widest rows spill.
STACK_BUDGET = 128

Found = list[tuple[int, Variant, Usage]]


def first_forms(chip: int) -> list[Variant]:
    firsts = variants()[: len(TRAFFIC)]
    return firsts if chip == 90 else [variant for variant in firsts if variant.kernel in ADDS_UP]


@pytest.fixture(scope="module", params=["first forms", pytest.param("all forms", marks=pytest.mark.slow)])
def usages(request: pytest.FixtureRequest) -> Found:
    choose = first_forms if request.param == "first forms" else lambda chip: variants()
    return compiled(kernels, compile_variant, [(chip, v) for chip in CHIPS for v in choose(chip)], request)


@pytest.mark.timeout(1200)
def test_every_form_is_fit_for_its_chip(usages: Found) -> None:
    assert {variant.kernel for chip, variant, _ in usages if chip == 90} == set(TRAFFIC)
    wrong = []
    for chip, variant, usage in usages:
        # A program that adds up also keeps the sums of its weights in registers.
        most = 168 if variant.kernel in ADDS_UP else MOST_REGISTERS
        if usage.registers > most:
            wrong.append(f"sm_{chip} {variant}: {usage.registers} registers")
        if usage.stack > (STACK_BUDGET if variant.size == WIDEST_NORM else 0):
            wrong.append(f"sm_{chip} {variant}: {usage.stack} B of stack")
        # Several programs must run at once, also on GPUs with little shared memory.
        if usage.shared > SHARED_MEMORY[89] // 3:
            wrong.append(f"sm_{chip} {variant}: {usage.shared} B of shared memory")
        wide = {name: n for name, n in usage.instructions.items() if name in ("LDG.E.128", "STG.E.128")}
        if len(wide) < (1 if variant.kernel == "row_statistics" else 2):
            wrong.append(f"sm_{chip} {variant}: no loads or stores of 16 bytes among {usage.instructions}")
    assert not wrong, "\n".join(wrong)


def test_a_kernel_that_spills_is_seen() -> None:
    """Check that a row twice as wide as the widest accepted one, in fp32, exceeds the stack budget."""
    assert compile_variant(Variant("add_rms_norm_backward", torch.float32, 2 * WIDEST_NORM), 90).stack > STACK_BUDGET
