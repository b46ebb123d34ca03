"""Compare the adapter's bound with exact enumeration, and run lm-evaluation-harness on local tasks."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance

from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.evaluate.harness import BlockDiffusionLM, windows_of
from bd3_scale.objective import BlockDiffusion
from bd3_scale.recipe.schema import DiffusionRecipe

CPU = torch.device("cpu")
BYTES = load_tokenizer("bytes")
MASK = BYTES.vocabulary.mask_id


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(BYTES.vocabulary)


@pytest.fixture
def adapter(groups, model):
    def make(block_size=4, draws=8, max_length=64):
        objective = BlockDiffusion(DiffusionRecipe(block_size=block_size), BYTES.vocabulary)
        return BlockDiffusionLM(model, groups, BYTES, objective=objective, max_length=max_length, draws=draws)

    return make


def asked(*pairs, kind="loglikelihood"):
    return [Instance(kind, {}, pair, number, ("task", number, 1)) for number, pair in enumerate(pairs)]


@torch.no_grad()
def log_probs(model, given, block):
    """Return log probabilities [L', V] of a block's tokens after clean blocks `given`, by decoding against a cache."""
    size = len(block)
    cache = model.new_cache(1, len(given) + size)
    for start in range(0, len(given), size):
        positions = torch.arange(start, start + size)[None]
        model.prefill(torch.tensor([given[start : start + size]]), positions, cache)
    positions = torch.arange(len(given), len(given) + size)[None]
    return model.decode(torch.tensor([block]), positions, cache)[0].log_softmax(-1)


def test_at_block_size_one_it_is_the_likelihood(adapter, model):
    context, continuation = "The quick", " fox"
    ids = list((context + continuation).encode())
    expected = sum(log_probs(model, ids[:i], [MASK])[0, ids[i]].item() for i in range(len(context), len(ids)))
    (found,) = adapter(block_size=1).loglikelihood(asked((context, continuation)))
    assert found[0] == pytest.approx(expected, rel=1e-5)
    every = adapter(block_size=1).loglikelihood(asked(*((context, chr(byte)) for byte in range(128))))
    assert sum(math.exp(bound) for bound, _ in every) < 1, "128 of 257 tokens"


def test_inside_a_block_it_is_the_enumerated_bound(adapter, model):
    """Check two tokens after a clean one and before one that is always masked: half of each nll, alone and in pair."""
    text = "abcdeXY"
    ids = list(text.encode())
    expected = 0.0
    for hidden in ([5], [6], [5, 6]):
        block = [MASK if i in hidden else ids[i] for i in range(4, 7)] + [MASK]
        found = log_probs(model, ids[:4], block)
        expected += sum(0.5 * found[i - 4, ids[i]].item() for i in hidden)
    # Documents with different numbers get different noise.
    requests = [Instance("loglikelihood", {}, ("abcde", "XY"), n, ("task", n, 1)) for n in range(200)]
    bounds = torch.tensor([bound for bound, _ in adapter(draws=8).loglikelihood(requests)])
    assert bounds.std() > 0
    assert abs(bounds.mean() - expected) < 4 * bounds.std() / 200**0.5


def test_context_is_never_masked_and_what_follows_always_is(adapter):
    """Check all rates, also in a block that holds the context's end and the continuation's beginning."""
    bounds = adapter(draws=4)._bounds
    pairs = [([7] * 5, [8] * 2), ([], [8] * 9), ([7] * 8, [8])]
    masked = torch.stack([bounds._noise(pairs, [3, 4, 5], 12, draw).masked for draw in range(4)])
    for row, (given, scored) in enumerate(pairs):
        end = len(given) + len(scored)
        assert not masked[:, row, : len(given)].any()
        assert masked[:, row, end:].all()
    assert 0 < masked[:, 1, :9].float().mean() < 1


def test_a_bound_depends_on_its_own_request_alone(adapter):
    pairs = [("Hello", " world"), ("", "a"), ("x" * 30, "yz"), ("Hello", " there, you all")]
    together = adapter().loglikelihood(asked(*pairs))
    for number, pair in enumerate(pairs):
        alone = adapter().loglikelihood([Instance("loglikelihood", {}, pair, number, ("task", number, 1))])
        assert alone[0][0] == pytest.approx(together[number][0], rel=1e-5)
        assert alone[0][1] == together[number][1]


def test_greedy_decoding_is_recognised(adapter):
    lm = adapter()
    (text,) = lm.generate_until(asked(("Once upon", {"max_gen_toks": 6, "until": []}), kind="generate_until"))
    # Bytes that are not UTF-8 cannot be recovered from text.
    ids = lm._generated(list(b"Once upon"), 6, 0.0)
    assert lm._is_greedy(list(b"Once upon"), ids)
    assert not lm._is_greedy(list(b"Once upon"), [ids[0] ^ 1, *ids[1:]])
    stop = text[2]
    (cut,) = lm.generate_until(asked(("Once upon", {"max_gen_toks": 6, "until": [stop, "~~"]}), kind="generate_until"))
    assert cut == text[: text.index(stop)]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_windows_predict_each_token_once_with_all_the_context_that_fits(count):
    ids = list(range(count))
    windows = list(windows_of(ids, 8))
    assert [i for _, scored in windows for i in scored] == ids
    for given, scored in windows:
        assert given + scored == ids[max(0, scored[-1] - 7) : scored[-1] + 1]


def test_a_rolling_likelihood_is_that_of_its_windows(adapter):
    lm = adapter(block_size=1, max_length=8)
    text = "A longer text."
    (found,) = lm.loglikelihood_rolling(asked((text,), kind="loglikelihood_rolling"))
    first = lm.loglikelihood(asked(("", text[:8])))[0][0]
    rest = lm.loglikelihood(asked((text[6:8], text[8:])))[0][0]
    assert found == pytest.approx(first + rest, rel=1e-5)
    with pytest.raises(ValueError, match=r"continuation of 9 tokens is longer than the 8"):
        lm.loglikelihood(asked(("a", "123456789")))


TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}
DOCUMENTS = [
    {"question": f"Number {n} and then", "choices": [" one", " two more", " 3"], "answer": n % 3} for n in range(6)
]


@pytest.fixture
def tasks(tmp_path):
    """Write a folder of local tasks for the harness."""
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.jsonl")}}}
        content = {"task": f"local_{name}", "test_split": "test", **data, **task}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def test_the_harness_measures_what_the_bounds_say(adapter, tasks, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm = adapter(draws=4)
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=[f"local_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0,
    )["results"]
    right, nats, same = 0, 0.0, 0
    for number, document in enumerate(DOCUMENTS):
        pairs = [(document["question"], choice) for choice in document["choices"]]
        requests = [Instance("loglikelihood", {}, pair, n, ("task", number, 1)) for n, pair in enumerate(pairs)]
        bounds = [bound for bound, _ in lm.loglikelihood(requests)]
        right += bounds.index(max(bounds)) == document["answer"]
        text = Instance("loglikelihood_rolling", {}, (document["question"],), 0, ("task", number, 1))
        nats -= lm.loglikelihood_rolling([text])[0]
        options = {"max_gen_toks": 4, "until": ["\n"]}
        same += lm.generate_until(asked((document["question"], options), kind="generate_until"))[0] == " one"
    size = sum(len(document["question"]) for document in DOCUMENTS)
    assert found["local_choice"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))
    assert found["local_rolling"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["local_writing"]["exact_match,none"] == pytest.approx(same / len(DOCUMENTS))
