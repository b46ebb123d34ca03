"""Check that oneDNN's products equal PyTorch's up to rounding, in every layout, and that the right library is used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bd3_scale import processor
from bd3_scale.model import products
from bd3_scale.model.linear import packed


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch):
    def chosen(name: str | None, vendor: str = "GenuineIntel", flags: tuple[str, ...] = ("avx2", "avx512f")) -> str:
        monkeypatch.delenv(products.ENVIRONMENT, raising=False)
        if name is not None:
            monkeypatch.setenv(products.ENVIRONMENT, name)
        monkeypatch.setattr(processor, "vendor", lambda: vendor)
        monkeypatch.setattr(processor, "flags", lambda: frozenset(flags))
        products.fp32_library.cache_clear()
        return products.fp32_library()

    yield chosen
    monkeypatch.undo()
    products.fp32_library.cache_clear()


def operands(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Draw operands with different sizes, so that the weight's gradient shows a swap of inputs and outputs."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, generator=generator, dtype=dtype) for size in ((300, 128), (200, 128), (200,)))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", products.LIBRARIES)
def test_the_three_products_are_those_of_fp64(name: str, wide: bool, library) -> None:
    assert library(name) == name
    x, weight, bias = operands()
    if wide:
        x, weight = F.pad(x, (0, 200)), F.pad(weight, (0, 200))
    grad = F.linear(x, weight).cos()
    cases = (
        (products.product, (x, weight, bias), F.linear(x, weight, bias)),
        (products.input_gradient, (grad, weight), grad @ weight),
        (products.weight_gradient, (grad, x), grad.t() @ x),
    )
    for function, given, exact in cases:
        with FlopCounterMode(display=False) as counter:
            found = function(*(value.float() for value in given))
        assert counter.get_total_flops() == 2 * 300 * 200 * x.shape[1]
        torch.testing.assert_close(found, exact.float(), atol=2e-5, rtol=1e-5)
        ran = [str(operator) for operator in counter.get_flop_counts()["Global"]]
        assert any("_linear_pointwise" in operator for operator in ran) == (name == "onednn"), ran


def test_what_onednn_does_not_take_is_pytorchs_to_the_bit(library) -> None:
    library("onednn")
    x, weight, bias = operands()
    given = [values[: 8 if values.ndim > 1 else None].float() for values in (x, weight)]
    assert products.product(*given).equal(F.linear(*given)), "small ones are quicker so"
    for dtype in (torch.bfloat16, torch.float64):
        x, weight, bias = operands(dtype)
        assert products.product(x, weight, bias).equal(F.linear(x, weight, bias))
        assert products.weight_gradient(x[:, :100], x).equal(x[:, :100].t() @ x)
    with FakeTensorMode() as mode:
        for device in ("cpu", "meta"):
            fake = torch.empty(300, 128, device=device)
            with FlopCounterMode(display=False) as counter:
                products.product(fake, fake, None)
            assert "linear_pointwise" not in str(counter.get_flop_counts())
        assert mode is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", products.LIBRARIES)
def test_weights_laid_out_for_decoding_make_the_same_product(name: str, dtype: torch.dtype, library) -> None:
    library(name)
    x, weight, bias = operands(dtype)
    x = x[:32].unflatten(0, (2, 16))
    exact = [F.linear(x.double(), weight.double(), add) for add in (None, bias.double())]
    for want, add in zip(exact, (None, bias), strict=True):
        tolerance = {"atol": 2e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.2, "rtol": 1e-2}
        torch.testing.assert_close(packed(weight, add)(x).double(), want, **tolerance)


@pytest.mark.parametrize(("name", "size", "by_onednn"), [(None, 1024, True), (None, 512, False), ("mkl", 1024, False)])
def test_large_weights_are_laid_out_for_onednn_on_intel_too(name, size, by_onednn, library) -> None:
    assert library(name) == "mkl"
    x, weight = torch.randn(2, 16, 64), torch.randn(size * 16, 64)
    with FlopCounterMode(display=False) as counter:
        torch.testing.assert_close(packed(weight, None)(x), F.linear(x, weight), atol=1e-4, rtol=1e-4)
    assert ("_linear_pointwise" in str(counter.get_flop_counts())) == by_onednn


def test_a_cpu_is_asked_for_its_maker_and_its_flags(library) -> None:
    assert library(None) == "mkl"
    assert library(None, "AuthenticAMD") == "onednn"
    assert library(None, "AuthenticAMD", ("avx2",)) == "mkl", "MKL's AVX2 kernels are as quick as any"
    assert library("mkl", "AuthenticAMD") == "mkl"
    with pytest.raises(ValueError, match=r"BD3_SCALE_PRODUCTS is 'blas': set it to mkl or onednn"):
        library("blas")


def test_onednn_that_multiplies_in_bf16_is_not_asked(library, monkeypatch) -> None:
    exact = products._onednn
    rounded = lambda x, weight, bias: exact(x.bfloat16(), weight.bfloat16(), None).float()  # noqa: E731
    monkeypatch.setattr(products, "_onednn", rounded)
    assert library(None, "AuthenticAMD") == "mkl"
