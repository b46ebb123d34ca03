"""Check products on tensor-parallel ranks against one whole product, in any number of pieces, and that their gradients
are summed in fp32."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig

from bd3_scale.fused.swiglu import swiglu
from bd3_scale.model.block import ACTIVATIONS
from bd3_scale.model.exchange import gather_rows, own_rows, sum_rows
from bd3_scale.model.linear import ColumnLinear, RowLinear
from bd3_scale.model.products import add_weight_gradient
from bd3_scale.parallel.groups import process_groups
from bd3_scale.recipe.schema import ParallelRecipe
from tests.support.forks import run_ranks

ROWS, BATCH, WIDTH, INNER = 16, 3, 8, 12


def whole() -> dict[str, torch.Tensor]:
    """Return both weights, their biases, the rows and the gradient's direction, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"up": (2 * INNER, WIDTH), "down": (WIDTH, INNER), "up_bias": (2 * INNER,), "down_bias": (WIDTH,)}
    shapes |= {"x": (ROWS, BATCH, WIDTH), "direction": (ROWS, BATCH, WIDTH)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def plain() -> dict[str, torch.Tensor]:
    """Return the output of two products around SwiGLU, and the gradients, by plain autograd."""
    leaves = {name: value.requires_grad_() for name, value in whole().items()}
    wide = leaves["x"] @ leaves["up"].t() + leaves["up_bias"]
    gate, up = wide.chunk(2, -1)
    out = (torch.nn.functional.silu(gate) * up) @ leaves["down"].t() + leaves["down_bias"]
    (out * leaves["direction"].detach()).sum().backward()
    grads = {name: value.grad for name, value in leaves.items() if value.grad is not None}
    return {"out": out.detach(), **grads}


def check_on_two_ranks() -> None:
    with process_groups(ParallelRecipe(tensor=2)) as groups:
        check_products(groups.tp)
        check_rows(groups.tp)


def check_products(group: dist.ProcessGroup) -> None:
    expected, tensors = plain(), whole()
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def mine(name: str) -> torch.Tensor:
        if name.startswith("up"):
            gate, up = tensors[name].chunk(2)
            return torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]])
        return tensors[name].chunk(ranks, 1)[rank]

    for sequence, pieces, activation, summed in itertools.product(
        (False, True), (1, 2, 4), (None, "swiglu"), (False, True)
    ):
        up, down = layers(sequence, group)
        up.weight.data, up.bias.data = mine("up"), mine("up_bias")
        down.weight.data, down.bias.data = mine("down").contiguous(), tensors["down_bias"].clone()
        for weight in (up.weight, down.weight) if summed else ():
            weight.main_grad = torch.ones_like(weight)
        x = own_rows(tensors["x"], pieces, group) if sequence else tensors["x"].clone()
        x.requires_grad_()
        wide = up(x, pieces)
        out = down(wide, pieces, activation=ACTIVATIONS[activation]) if activation else down(swiglu(wide), pieces)
        direction = tensors["direction"]
        direction = own_rows(direction, pieces, group) if sequence else direction
        (out * direction).sum().backward()

        close(out, own_rows(expected["out"], pieces, group) if sequence else expected["out"])
        close(x.grad, own_rows(expected["x"], pieces, group) if sequence else expected["x"])
        gate_and_up = [part.chunk(ranks)[rank] for part in expected["up"].chunk(2)]
        wanted = {up: torch.cat(gate_and_up), down: expected["down"].chunk(ranks, 1)[rank]}
        for layer, gradient in wanted.items():
            assert (layer.weight.grad is None) == summed
            close(layer.weight.main_grad - 1 if summed else layer.weight.grad, gradient)
        # A rank's gradient covers its rows of the sum, which may be all rows.
        bias = down.bias.grad.clone()
        if sequence:
            dist.all_reduce(bias)
        close(bias, expected["down_bias"])


def test_a_weight_learns_from_rows_that_need_no_gradient(groups):
    """Check that the activation of the input is computed in backward where only the weight needs it."""
    tensors = whole()
    _, down = layers(False, groups.tp)
    down.weight.data, down.bias.data = tensors["down"].clone(), tensors["down_bias"].clone()
    wide = tensors["x"] @ tensors["up"].t()
    found, wanted = (
        torch.autograd.grad((out * tensors["direction"]).sum(), down.weight)[0]
        for out in (down(wide, activation=ACTIVATIONS["swiglu"]), down(swiglu(wide)))
    )
    close(found, wanted)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def layers(sequence: bool, group: dist.ProcessGroup) -> tuple[ColumnLinear, RowLinear]:
    config = ModelParallelConfig(
        tensor_model_parallel_size=group.size(),
        sequence_parallel=sequence,
        perform_initialization=False,
        use_cpu_initialization=True,
        params_dtype=torch.float64,
    )
    up = ColumnLinear(WIDTH, 2 * INNER, bias=True, config=config, group=group)
    return up, RowLinear(INNER, WIDTH, bias=True, config=config, group=group)


def check_rows(group: dist.ProcessGroup) -> None:
    """Check that rows keep their order in any number of pieces, and that gradients go back where the rows came from."""
    rows = torch.arange(24.0).view(12, 2)
    for pieces in (1, 2, 3, 6):
        mine = own_rows(rows, pieces, group).requires_grad_()
        found = gather_rows(mine, pieces, group)
        assert torch.equal(found, rows)
        (found * rows).sum().backward()
        assert torch.equal(mine.grad, 2 * own_rows(rows, pieces, group))
        everyone = rows.clone().requires_grad_()
        summed = sum_rows(everyone * (dist.get_rank() + 1), pieces, group)
        assert torch.equal(summed, 3 * own_rows(rows, pieces, group))
        summed.sum().backward()
        assert torch.equal(everyone.grad, torch.full_like(rows, dist.get_rank() + 1.0))


def test_two_products_on_two_ranks_are_those_of_one(tmp_path):
    run_ranks(check_on_two_ranks, 2, logs=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_products_gradient_is_added_in_fp32(dtype):
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 64), (64, 7)))
    total = torch.full((5, 7), 1e-3)
    add_weight_gradient(total, left.t(), right)
    exact = 1e-3 + left.double() @ right.double()
    assert (total - exact).norm() < (1e-6 if dtype == torch.float32 else 4e-3) * exact.norm()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activations_backward_gives_its_output_again(name):
    generator = torch.Generator().manual_seed(3)
    activation, x = ACTIVATIONS[name], torch.randn(5, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    out = activation.forward(x)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(out, x, direction)
    found, again = activation.backward(direction, x.detach())
    assert torch.equal(again, out)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
