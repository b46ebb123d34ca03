"""Compile kernel variants for GPUs that this machine does not have.

`make test` compiles the default tile of every form for one GPU, and of the most common form for the others.
`make test-all` compiles all tiles.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bd3_scale.attention import kernels
from bd3_scale.attention.kernels.offline import Variant, compile_variant, variants
from bd3_scale.attention.kernels.tiles import KERNELS, Tile, candidates
from bd3_scale.offline import SHARED_MEMORY, Usage
from tests.support.compiled import compiled

pytestmark = pytest.mark.launch

CHIPS = (80, 90, 100)
# Bytes a thread. A few spilled registers cost little; a tile of products in memory takes thousands of bytes.
STACK_BUDGET = 192
WITHOUT_PRODUCTS = {"delta", "combine"}
STREAMING = {"forward", "query_gradient", "clean_key_gradient", "fused_gradient"}
ALL_KERNELS = (*KERNELS, "noisy_fused_gradient", "decode", *WITHOUT_PRODUCTS)

Found = list[tuple[int, Variant, Usage]]


def first_tiles(chip: int) -> list[Variant]:
    """Return each kernel's default tile: for sm_90 in every form, for other GPUs in one form."""
    firsts = {(v.kernel, v.head_dim, v.dtype, v.form): v for v in reversed(variants(chip))}
    common = (128, torch.bfloat16)
    return [v for (_, *form, _), v in firsts.items() if chip == 90 or tuple(form) == common]


@pytest.fixture(scope="module", params=["first tiles", pytest.param("all tiles", marks=pytest.mark.slow)])
def usages(request: pytest.FixtureRequest) -> Found:
    choose = first_tiles if request.param == "first tiles" else variants
    return compiled(kernels, compile_variant, [(chip, v) for chip in CHIPS for v in choose(chip)], request)


def matrix_instructions(chip: int, variant: Variant) -> set[str]:
    """Return the fastest matrix instruction that the GPU has for the variant's tile."""
    side = variant.tile.keys if "key" in variant.kernel or "fused" in variant.kernel else variant.tile.rows
    own = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[chip]
    # A warp group multiplies 64 rows at a time; fewer rows, and float32, use the older instruction.
    return {own} if side >= 64 and variant.dtype.itemsize == 2 else {own, "HMMA"}


@pytest.mark.timeout(1200)
def test_every_variant_is_fit_for_its_chip(usages: Found) -> None:
    compiled = {(chip, variant.kernel, variant.head_dim, variant.dtype) for chip, variant, _ in usages}
    assert {(chip, kernel, 128, torch.bfloat16) for chip in CHIPS for kernel in ALL_KERNELS} <= compiled
    assert {(90, kernel, dim, torch.bfloat16) for kernel in ALL_KERNELS for dim in (64, 256)} <= compiled
    wrong = []
    for chip, variant, usage in usages:
        present = usage.instructions.keys()
        if usage.shared > SHARED_MEMORY[chip]:
            wrong.append(f"sm_{chip} {variant}: {usage.shared} B of shared memory, the chip has {SHARED_MEMORY[chip]}")
        if usage.stack > STACK_BUDGET:
            wrong.append(f"sm_{chip} {variant}: {usage.stack} B of stack")
        if variant.kernel not in WITHOUT_PRODUCTS and not matrix_instructions(chip, variant) & present:
            wrong.append(f"sm_{chip} {variant}: no matrix instruction among {usage.instructions}")
        if variant.kernel in STREAMING and chip >= 90 and "UTMALDG" not in present:
            wrong.append(f"sm_{chip} {variant}: no bulk load among {usage.instructions}")
        if variant.kernel == "fused_gradient" and chip >= 90 and "UTMAREDG" not in present:
            wrong.append(f"sm_{chip} {variant}: no bulk reduction among {usage.instructions}")
        if chip == 80 and variant.tile.num_stages > 1 and "LDGSTS" not in present:
            wrong.append(f"sm_{chip} {variant}: loads that do not overlap with products, {usage.instructions}")
    assert not wrong, "\n".join(wrong)


def test_tiles_fit_chips_with_less_shared_memory() -> None:
    """Check that sm_80's tiles also fit sm_86, sm_89 and sm_12x, which have 99 KiB of shared memory."""
    for chip in (89, 120):
        assert candidates("forward", 128, torch.bfloat16, divmod(chip, 10)) == candidates(
            "forward", 128, torch.bfloat16, (8, 0)
        )


@pytest.mark.timeout(600)
def test_sm_80_leaves_room_for_smaller_chips(usages: Found) -> None:
    for chip, variant, usage in usages:
        assert chip != 80 or usage.shared <= SHARED_MEMORY[89], f"{variant}: {usage.shared} B"


def test_a_tile_too_large_is_seen() -> None:
    variant = Variant("clean_key_gradient", 128, torch.bfloat16, Tile(64, 128, 4, 2), tma=True)
    assert compile_variant(variant, 90).stack > STACK_BUDGET
    variant = Variant("forward", 256, torch.bfloat16, Tile(128, 128, 8, 3), tma=True)
    assert compile_variant(variant, 90).shared > SHARED_MEMORY[90]


def test_the_tool_refuses_an_unknown_chip() -> None:
    tool = Path(__file__).parents[2] / "tools" / "compile_kernels.py"
    done = subprocess.run([sys.executable, tool, "70"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "unknown chip 70: choose among 80" in done.stderr
