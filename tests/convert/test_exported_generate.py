"""Check the arguments that `generate` of exported code shares with transformers. remote_code_checks.py and
tests/generate/test_confidence.py check the text that it writes.
"""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.observe.libraries import without_broken_torchvision

with without_broken_torchvision():
    from transformers import GenerationConfig, PreTrainedTokenizerFast, TextIteratorStreamer

    from bd3_scale.convert.remote_code.configuration_bd3 import Bd3Config
    from bd3_scale.convert.remote_code.modeling_bd3 import Bd3ForCausalLM

EOS, MASK, K = 256, 257, 4
LETTERS = range(ord("a"), ord("z") + 1)


@pytest.fixture(scope="module")
def model() -> Bd3ForCausalLM:
    """Return a random model that writes letters, and not always the same one."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": EOS}
    config = Bd3Config(vocab_size=258, block_size=K, head_bias=True, initializer_range=0.5, **shape, **ids)
    model = Bd3ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.bias.fill_(-100.0)
        model.lm_head.bias[list(LETTERS)] = 0.0
        model.lm_head.weight.mul_(0.5)
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.fill_(4.0)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer("bytes").save(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(97, 123, (1, length), generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: list[torch.Tensor], more: int = 0) -> dict[str, torch.Tensor]:
    width = max(p.shape[1] for p in prompts) + more
    ids = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0), value=EOS) for p in prompts])
    mask = torch.tensor([[0] * (width - p.shape[1]) + [1] * p.shape[1] for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    # Where nothing but masks is seen, they are all equal, and which is taken first hangs on the last bits.
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=4),
    more=st.integers(0, 5),
    count=st.integers(1, 9),
    rule=st.sampled_from(
        [{"unmasking": "static", "steps": 2}, {"threshold": 0.2}, {"block_size": 3, "threshold": 0.2}]
    ),
    stop=st.sampled_from([[], *([letter] for letter in list(LETTERS)[::3])]),
)
def test_padding_on_the_left_changes_nothing(model, lengths, more, count, rule, stop):
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    how = {"max_new_tokens": count, "eos_token_id": stop, "pad_token_id": 999, **rule}
    padded = left_padded(prompts, more)
    together = model.generate(**padded, **how)
    width = padded["input_ids"].shape[1]
    assert torch.equal(together[:, :width], padded["input_ids"])
    alone = [model.generate(p, **how)[0, p.shape[1] :].tolist() for p in prompts]
    longest = max(map(len, alone))
    assert together[:, width:].tolist() == [new + [999] * (longest - len(new)) for new in alone]


@pytest.mark.parametrize("mask", [[[1, 1, 1, 0]], [[1, 0, 1, 1]], [[1, 1, 1]], [[[1, 1, 1, 1]]]])
def test_other_masks_are_refused(model, mask):
    with pytest.raises(ValueError, match=r"the prompts' shape \[1, 4\].*padding_side = 'left'"):
        model.generate(prompt(4), attention_mask=torch.tensor(mask), max_new_tokens=2)


class Recorder:
    def __init__(self) -> None:
        self.parts: list[list] = []

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.tolist())

    def end(self) -> None:
        self.parts.append(["end"])


@pytest.mark.parametrize("padding", [0, 2])
def test_a_streamer_is_given_the_prompt_and_block_after_block(model, padding):
    streamer, inputs = Recorder(), left_padded([prompt(6)], padding)
    out = model.generate(**inputs, max_new_tokens=11, eos_token_id=[], streamer=streamer)
    first, *blocks, last = streamer.parts
    assert first == inputs["input_ids"].tolist()
    assert [len(block) for block in blocks] == [2, 4, 4, 1]
    assert list(chain(*blocks)) == out[0, 6 + padding :].tolist()
    assert last == ["end"]
    with pytest.raises(ValueError, match="a streamer is for one text, not for 2"):
        model.generate(prompt(3).expand(2, -1), max_new_tokens=2, streamer=streamer)


def test_a_streamer_ends_with_the_stop_token(model):
    free = model.generate(prompt(6), max_new_tokens=11, eos_token_id=[])[0, 6:].tolist()
    streamer, stop = Recorder(), free[4]
    model.generate(prompt(6), max_new_tokens=11, eos_token_id=stop, streamer=streamer)
    assert list(chain(*streamer.parts[1:-1])) == free[: free.index(stop) + 1]


def test_transformers_streams_text(model, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = model.generate(prompt(6), max_new_tokens=11, eos_token_id=[], streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0, 6:])


@pytest.mark.parametrize("place", [0, 1, 4, 7])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_stop_string_ends_a_text_behind_it(model, tokenizer, place, batch):
    inputs = left_padded([prompt(5), prompt(7, 1)][:batch])
    width, how = inputs["input_ids"].shape[1], {"max_new_tokens": 11, "eos_token_id": []}
    free = [tokenizer.decode(row) for row in model.generate(**inputs, **how)[:, width:]]
    stops = [free[0][place : place + 2], "##"]
    found = model.generate(**inputs, **how, stop_strings=stops, tokenizer=tokenizer, pad_token_id=EOS)
    for row, text in zip(found[:, width:], free, strict=True):
        end = text.find(stops[0])
        assert tokenizer.decode(row, skip_special_tokens=True) == (text if end < 0 else text[: end + 2])
    with pytest.raises(ValueError, match="stop_strings needs the tokeniser"):
        model.generate(**inputs, **how, stop_strings=stops)


@pytest.mark.parametrize("lengths", [(5, 7), (7, 2), (1, 11), (6, 6)])
def test_criteria_are_asked_as_transformers_asks_them(model, lengths):
    """Check that criteria are called after each token of the batch, with ended texts padded, as transformers does."""
    inputs, seen = left_padded([prompt(length, seed) for seed, length in enumerate(lengths)]), []
    width = max(lengths)

    def after_three_and_six(ids: torch.Tensor, scores: object, **more: object) -> torch.Tensor:
        seen.append(ids.tolist())
        return torch.tensor([ids.shape[1] == width + 3, ids.shape[1] == width + 6])

    def after_eight(ids: torch.Tensor, scores: object, **more: object) -> bool:
        return ids.shape[1] == width + 8

    how = {"max_new_tokens": 11, "eos_token_id": []}
    expected = model.generate(**inputs, **how)
    assert torch.equal(model.generate(**inputs, **how, stopping_criteria=[after_eight]), expected[:, : width + 8])
    expected[0, width + 3 :] = EOS
    found = model.generate(**inputs, **how, stopping_criteria=[after_three_and_six, after_eight])
    assert torch.equal(found, expected[:, : width + 6])
    assert seen[:6] == [expected[:, : width + count].tolist() for count in range(1, 7)]


def test_time_ends_a_text(model):
    assert model.generate(prompt(6), max_new_tokens=9, eos_token_id=[], max_time=0.0).shape == (1, 7)


def test_a_generation_config_goes_before_the_model_s_and_arguments_before_both(model, monkeypatch):
    def new(*args, **options) -> list[int]:
        return model.generate(prompt(6), *args, **options)[0, 6:].tolist()

    free = new(max_new_tokens=9, eos_token_id=[], unmasking="static", steps=2)
    given = GenerationConfig(max_new_tokens=9, unmasking="static", steps=2, eos_token_id=[])
    assert new(given) == new(generation_config=given) == free
    assert new(given, max_new_tokens=5) == free[:5]
    assert new(given, steps=4) == new(max_new_tokens=9, eos_token_id=[], unmasking="static") != free
    monkeypatch.setattr(model.generation_config, "eos_token_id", free[2])
    stopped = free[: free.index(free[2]) + 1]
    assert new(max_new_tokens=9, unmasking="static", steps=2) == stopped
    assert new(GenerationConfig(max_new_tokens=9, unmasking="static", steps=2)) == stopped
    assert new(GenerationConfig(max_length=11, unmasking="static", steps=2), eos_token_id=[]) == free[:5]
    assert new(eos_token_id=[], max_length=10, unmasking="static", steps=2) == free[:4]
    assert len(new(eos_token_id=[])) == len(new(GenerationConfig(eos_token_id=[]))) == 20
    with pytest.raises(ValueError, match="a max_length counts the prompt, too"):
        new(max_length=6)


def test_tokens_are_drawn_where_do_sample_says_so(model, monkeypatch):
    def new(seed: int = 0, **options) -> list[int]:
        random = torch.Generator().manual_seed(seed)
        return model.generate(prompt(6), max_new_tokens=16, eos_token_id=[], generator=random, **options).tolist()

    greedy, sampled = new(), new(do_sample=True)
    assert new(1) == greedy == new(temperature=1.5) == new(do_sample=True, temperature=0.0)
    assert greedy == new(do_sample=True, top_k=1) == new(do_sample=True, top_p=1e-9)
    assert len({str(text) for text in (greedy, sampled, new(1, do_sample=True))}) == 3
    assert new(do_sample=True, temperature=5.0) not in (greedy, sampled)
    assert new(do_sample=True, top_k=0) == new(do_sample=True, top_k=258)
    for name, value in {"do_sample": True, "top_k": 258}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert new() == new(do_sample=True, top_k=258)
    assert new(do_sample=False) == greedy


def test_several_texts_of_a_prompt_and_a_dictionary(model):
    how = {"max_new_tokens": 9, "do_sample": True, "num_return_sequences": 3, "return_dict_in_generate": True}
    out = model.generate(**left_padded([prompt(5), prompt(7)]), **how)
    assert list(out) == ["sequences"]
    assert out.sequences.shape == (6, 16)
    assert len({str(row) for row in out.sequences.tolist()}) == 6
    assert out.sequences[:, 0].tolist() == [EOS] * 3 + [int(prompt(7)[0, 0])] * 3


def test_no_prompt_is_one_that_begins_a_text(model):
    how = {"max_new_tokens": 5, "eos_token_id": []}
    assert torch.equal(model.generate(**how), model.generate(torch.empty(1, 0, dtype=torch.long), **how))
    assert torch.equal(model.generate(**how, bos_token_id=98), model.generate(torch.tensor([[98]]), **how))
    with pytest.raises(ValueError, match=r"input_ids has the shape \[3\]"):
        model.generate(prompt(3)[0], **how)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"assistant_model": object()},
        {"logits_processor": [print]},
        {"prefix_allowed_tokens_fn": print},
        {"repetition_penalty": 1.2},
        {"min_p": 0.1},
        {"min_new_tokens": 3},
        {"bad_words_ids": [[1]]},
        {"prompt_lookup_num_tokens": 3},
        {"output_scores": True},
        {"output_hidden_states": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"inputs_embeds": torch.zeros(1, 3, 32)},
        {"token_type_ids": torch.zeros(1, 3)},
        {"max_new_token": 5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_this_model_does_not_do_is_refused_by_name(model, options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"does not support {name}: leave it out"):
        model.generate(prompt(3), max_new_tokens=2, **options)
    if hasattr(GenerationConfig(), name):
        with pytest.raises(ValueError, match=rf"does not support {name}: leave it out"):
            model.generate(prompt(3), GenerationConfig(**options), max_new_tokens=2)


def test_what_the_model_s_own_generation_config_says_of_that_is_told(model, monkeypatch, caplog):
    """Check an adapted model, which has the generation config of its source and still generates."""
    free = model.generate(prompt(3), max_new_tokens=5)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.05)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model.generate(prompt(3), max_new_tokens=5), free)
    assert "says repetition_penalty=1.05, which has no effect here" in caplog.text
    assert torch.equal(model.generate(prompt(3), max_new_tokens=5, repetition_penalty=1.0), free)
