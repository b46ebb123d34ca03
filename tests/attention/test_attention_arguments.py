"""Check which arguments are refused, by which name, and which backend is chosen."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from bd3_scale.attention.backends import ENVIRONMENT, choose_backend
from bd3_scale.attention.dispatch import block_attention, decode_attention
from bd3_scale.attention.spans import make_spans, take_ranges

CPU = torch.device("cpu")
SPANS = make_spans(torch.zeros(2, 12, dtype=torch.int64), 4)
Q, K = torch.randn(2, 24, 4, 8), torch.randn(2, 24, 2, 8)


def altered(row: int, position: int, value: int, spans: Tensor = SPANS) -> Tensor:
    spans = spans.clone()
    spans[row, 0, position] = value
    return spans


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q[..., 0]}, r"q has shape \(2, 24, 4\)"),
        ({"k": K[0]}, r"k has shape \(24, 2, 8\)"),
        ({"q": Q.long()}, "q is torch.int64"),
        ({"k": K.double()}, "k is torch.float64 on cpu, q torch.float32"),
        ({"v": K.half()}, "v is torch.float16 on cpu, q torch.float32"),
        ({"k": K.to("meta")}, "k is torch.float32 on meta, q torch.float32 on cpu"),
        ({"v": K.to("meta")}, "v is torch.float32 on meta, q torch.float32 on cpu"),
        ({"k": K[:1]}, r"k has shape \(1, 24, 2, 8\), q"),
        ({"v": K[..., :4]}, r"v has shape \(2, 24, 2, 4\), q"),
        ({"v": K[:, :-1]}, r"v has shape \(2, 23, 2, 8\), k"),
        ({"q": Q[:, :, :3]}, "k has 2 heads and q 3"),
        ({"k": K[:, :, :0], "v": K[:, :, :0]}, "k has 0 heads"),
        ({"q": Q[:, :-1]}, "q has 23 rows: 12 or 24 are needed for num_noisy=1"),
        ({"num_noisy": 3}, "q has 24 rows: 36 or 48"),
        ({"num_noisy": -1}, "num_noisy is -1"),
        ({"k": K[:, :20], "v": K[:, :20]}, "k has 20 rows"),
        ({"k": K[:, :12], "v": K[:, :12]}, "k has 12 rows"),
        ({"spans": SPANS[:2]}, r"spans has shape \(2, 2, 12\)"),
        ({"spans": SPANS[:, :1]}, r"spans has shape \(3, 1, 12\)"),
        ({"spans": SPANS.to("meta")}, "spans is on meta, q on cpu"),
        ({"spans": SPANS.long()}, "spans is torch.int64: torch.int32 is needed"),
        ({"spans": altered(1, 5, 3)}, "spans of sequence 0 at position 5"),
        ({"spans": altered(2, 11, 13)}, "spans of sequence 0 at position 11"),
        ({"spans": altered(0, 0, -1)}, "spans of sequence 0 at position 0"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"backend": "fast"}, "neither 'auto' nor a known name: .*'fast': known are reference, cpu, triton, flex"),
    ],
)
def test_misfits_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    arguments = {"q": Q, "k": K, "v": K, "spans": SPANS} | changes
    for backend in [changes["backend"]] if "backend" in changes else ["auto", "cpu", "reference"]:
        with pytest.raises(ValueError, match=message):
            block_attention(**(arguments | {"backend": backend}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": K[:, :7], "v": K[:, :7]}, "k has 7 rows"),
        ({"k": K[:, :19], "v": K[:, :19]}, "11, the number of clean keys"),
        ({"spans": altered(2, 3, 25, take_ranges(SPANS, [(4, 12)]))}, "25.*12, the number of clean keys"),
        ({"spans": altered(4, 7, 9, take_ranges(SPANS, [(4, 12)]))}, "own_start <= row"),
    ],
)
def test_misfits_of_a_rank_s_rows_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    spans = take_ranges(SPANS, [(4, 12)])
    arguments = {"q": Q[:, :16], "k": K[:, :20], "v": K[:, :20], "spans": spans} | changes
    block_attention(Q[:, :16], K[:, :20], K[:, :20], spans)
    with pytest.raises(ValueError, match=message):
        block_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q[0]}, r"q has shape \(24, 4, 8\)"),
        ({"v": K.to("meta")}, "v is torch.float32 on meta"),
        ({"q": Q[:, :, :3]}, "k has 2 heads and q 3"),
        ({"lengths": torch.tensor([5])}, r"lengths has shape \(1,\)"),
        ({"lengths": torch.tensor([5.0, 4.0])}, "lengths has shape .* and dtype torch.float32"),
        ({"lengths": torch.tensor([5, 4], device="meta")}, "lengths is on meta, q on cpu"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"backend": ""}, "no attention backend is called ''"),
    ],
)
def test_misfits_in_decoding_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_attention(**({"q": Q, "k": K, "v": K} | changes))


def test_auto_is_the_cpu_backend_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = block_attention(Q, K, K, SPANS)
    assert torch.equal(got, block_attention(Q, K, K, SPANS, backend="cpu"))
    assert choose_backend("auto", CPU, torch.float64, 7) == "cpu"


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert choose_backend("cpu", CPU, torch.float32, 64) == "reference"
    monkeypatch.setenv(ENVIRONMENT, "")
    assert choose_backend("cpu", CPU, torch.float32, 64) == "cpu"
    monkeypatch.setenv(ENVIRONMENT, "quick")
    with pytest.raises(ValueError, match=r"\$BD3_SCALE_ATTENTION is neither 'auto' .*'quick'"):
        block_attention(Q, K, K, SPANS, backend="cpu")


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("cpu", "meta", "'cpu' cannot run: it takes tensors on CPU, not on meta"),
        ("triton", "cpu", "'triton' cannot run: Triton kernels need a CUDA device|Triton is not installed"),
        ("flex", "cpu", "'flex' cannot run: .* on CUDA"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(backend: str, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_backend(backend, torch.device(device), torch.float32, 64)
