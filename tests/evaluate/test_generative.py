"""Samples judged by another model: its nats against transformers' own loss, and the figures that stand beside it."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.evaluate.generative import Judge, distinct, entropy, repetition

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))
from models import SHAPE, transformers_model

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A random Llama of bytes that takes 128 positions, and its folder."""
    folder = tmp_path_factory.mktemp("judge")
    model = transformers_model("Llama", vocab_size=258, **SHAPE)
    model.save_pretrained(folder)
    BYTES.save(folder)
    return model.eval(), folder


@pytest.mark.parametrize("length", [2, 60, 128, 129, 300])
def test_a_text_costs_what_transformers_says_in_windows(judge, length):
    model, folder = judge
    text = "The quick brown fox jumps over the lazy dog. " * 9
    nats, count = Judge(folder).nats(text[:length])
    ids = list(text[:length].encode())
    windows = [ids[start : start + 128] for start in range(0, length, 128)]
    # This tokeniser has no token that begins text: a window's first one is not judged.
    judged = [torch.tensor([window]) for window in windows if len(window) > 1]
    with torch.no_grad():
        expected = sum(float(model(row, labels=row).loss) * (row.shape[1] - 1) for row in judged)
    assert count == sum(row.shape[1] - 1 for row in judged)
    assert nats == pytest.approx(expected, rel=1e-5)


def test_a_text_of_one_token_tells_nothing(judge):
    assert Judge(judge[1]).nats("a") == (0.0, 0)
    with pytest.raises(ValueError, match="is no folder of a Hugging Face model"):
        Judge(judge[1] / "nowhere")


def test_repetition_and_entropy_see_what_perplexity_does_not():
    assert repetition([1, 2, 3, 4] * 5) == pytest.approx(1 - 4 / 17)
    assert repetition(range(20)) == 0
    assert repetition([1, 2, 3]) == 0
    assert entropy([7] * 9) == 0
    assert entropy([1, 2, 3, 4] * 5) == pytest.approx(math.log(4))
    assert entropy([]) == 0
    assert distinct([[1, 1, 2], [1, 2]], 1) == pytest.approx(2 / 5)
    assert distinct([[1, 1, 2], [1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct([[], [1]], 2) == 0
