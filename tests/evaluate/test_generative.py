"""Check samples scored by another model: its nats against transformers' own loss, and the other figures of a report."""

from __future__ import annotations

import json
import math
import pydoc_data.topics

import pytest
import torch

from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.evaluate.generative import Judge, distinct, entropy, repetition, score_samples
from bd3_scale.evaluate.mauve import human_texts
from bd3_scale.generate.writer import Written
from tests.convert.models import SHAPE, transformers_model

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Save a random Llama of bytes that takes 128 positions, and return it with its folder."""
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
    # This tokeniser has no token that begins text, so a window's first token is not scored.
    judged = [torch.tensor([window]) for window in windows if len(window) > 1]
    with torch.no_grad():
        expected = sum(float(model(row, labels=row).loss) * (row.shape[1] - 1) for row in judged)
    assert count == sum(row.shape[1] - 1 for row in judged)
    assert nats == pytest.approx(expected, rel=1e-5)


def test_a_text_of_one_token_tells_nothing(judge):
    assert Judge(judge[1]).nats("a") == (0.0, 0)
    with pytest.raises(ValueError, match="is not the folder of a Hugging Face model"):
        Judge(judge[1] / "nowhere")


@pytest.mark.parametrize("length", [1, 60, 128, 300])
def test_a_vector_is_the_last_layer_at_the_last_token_that_fits(judge, length):
    model, folder = judge
    text = ("The quick brown fox jumps over the lazy dog. " * 9)[:length]
    with torch.no_grad():
        expected = model.model(torch.tensor([list(text.encode())[:128]])).last_hidden_state[0, -1]
    assert Judge(folder).vector(text) == pytest.approx(expected.double().numpy(), abs=1e-5)
    assert not Judge(folder).vector("").any()


@pytest.mark.slow
def test_mauve_puts_human_text_above_text_that_repeats_itself(judge, tmp_path):
    source = tmp_path / "human.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in pydoc_data.topics.topics.values()))
    pieces = human_texts(source, BYTES, count=400, length=100)
    ours, references = pieces[::2], pieces[1::2]

    def score(texts):
        written = [Written("", text, list(text.encode()), "length", 1, 1, 0.0, None, 0.0) for text in texts]
        return score_samples(tmp_path, written, Judge(judge[1]), references, seed=1)

    human, repeated = score(ours), score(["the " * 25] * 100 + ["ab" * 50] * 100)
    assert human.mauve > 0.9
    assert repeated.mauve < 0.1
    assert repeated.repetition > 0.9 > human.repetition
    assert score(ours).mauve == human.mauve


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
