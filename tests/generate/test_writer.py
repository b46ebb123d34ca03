"""Check texts of an open model, whole and as streams of their blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.generate.config import SamplingConfig
from bd3_scale.generate.writer import Writer, without_start_of
from bd3_scale.model.build import build_model
from bd3_scale.recipe.schema import DataRecipe, DiffusionRecipe, ModelRecipe, Recipe, TrainRecipe

BYTES = load_tokenizer("bytes")
LETTERS = [*range(ord("a"), ord("f")), *"é日".encode()]
PROMPTS = ["", "abc", "a longer one"]
SAMPLING = SamplingConfig(max_new_tokens=40, seed=3)


@pytest.fixture(scope="module")
def writer(groups, tmp_path_factory):
    recipe = Recipe(
        name="tiny",
        model=ModelRecipe(
            num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=16, init_std=0.7, head_bias=True
        ),
        diffusion=DiffusionRecipe(block_size=4),
        data=DataRecipe(path="unused", seq_len=8),
        train=TrainRecipe(steps=1, global_batch_size=1, micro_batch_size=1),
    )
    cpu = torch.device("cpu")
    (model,) = build_model(recipe.model, BYTES.vocabulary, groups, dtype=torch.float32, device=cpu, seed=4)
    model.requires_grad_(False)
    model.output_layer.bias[:] = -30.0
    model.output_layer.bias[LETTERS] = 0.0
    model.output_layer.bias[BYTES.vocabulary.eos_id] = -1.0
    folder = tmp_path_factory.mktemp("no-template")
    return Writer(model, BYTES, 4, 64, (BYTES.vocabulary.eos_id,), lambda: 0.0, folder)


def joined(pieces, count):
    """Return each text's pieces joined, and the reason of its end."""
    texts, ends = [""] * count, [None] * count
    for piece in pieces:
        assert ends[piece.index] is None, "nothing comes behind the end"
        texts[piece.index] += piece.text
        ends[piece.index] = piece.stopped_by
    return texts, ends


@pytest.mark.parametrize("batch_size", [2, 16])
@pytest.mark.parametrize("stop", [(), ("ab",), ("bcd", "aa")])
def test_the_pieces_of_a_stream_make_the_text(writer, stop, batch_size):
    """Check characters whose bytes span two blocks, and stop strings that begin in one block and end in another."""
    prompts = PROMPTS * 4
    written = list(writer.write(prompts, SAMPLING, stop=stop, batch_size=batch_size))
    pieces = list(writer.stream(prompts, SAMPLING, stop=stop, batch_size=batch_size))
    texts, ends = joined(pieces, len(prompts))
    assert texts == [text.text for text in written]
    assert ends == [text.stopped_by for text in written]
    assert len(pieces) > 2 * len(prompts)
    assert {"eos", "stop string" if stop else "length"} <= set(ends)


def test_a_stream_comes_block_by_block(writer):
    counts = {0: [], 1: []}
    endless = replace(writer, eos_ids=())
    for piece in endless.stream(["", "ab"], SamplingConfig(max_new_tokens=12)):
        counts[piece.index].append(len(piece.text))
    assert [len(count) for count in counts.values()] == [3, 4]  # after "ab" the first and last blocks are half
    assert all(0 < sum(count) <= 12 for count in counts.values())


def test_filled_gaps_are_streamed_from_the_beginning_of_the_text(writer):
    prompts = ["ab[MASK][MASK]cde[MASK]fg[MASK]", "x[MASK]"]
    for limit in (0, 9):
        sampling = SamplingConfig(max_new_tokens=limit, unmasking="static")
        texts, _ = joined(writer.stream(prompts, sampling, infill=True), 2)
        assert texts == [text.text for text in writer.write(prompts, sampling, infill=True)]
        assert texts[1].startswith("x")


def test_an_open_model_writes_again_and_again_what_it_wrote(writer):
    """Check that text i depends only on the seed and i, whatever the batches and earlier streams were."""
    whole = [text.tokens for text in writer.write(PROMPTS, SAMPLING)]
    next(writer.stream(PROMPTS, SAMPLING))
    assert [text.tokens for text in writer.write(PROMPTS, SAMPLING, batch_size=1)] == whole
    last = SamplingConfig(max_new_tokens=40, seed=SAMPLING.seed + 2)
    assert [text.tokens for text in writer.write(PROMPTS[2:], last)] == whole[2:]


def test_who_watches_is_told_masks_and_who_waits_how_many_tokens_there_are(writer):
    seen, told = [], []
    watch, progress = (lambda *a: seen.append(a)), (lambda *a: told.append(a))
    sampling = SamplingConfig(max_new_tokens=8)
    (written,) = writer.write(["ab"], sampling, watch=watch, progress=progress)
    assert seen[0] == (0, "ab[MASK][MASK]")
    assert [text.count("[MASK]") for _, text in seen][:3] == [2, 1, 0]
    assert seen[-1][1].startswith("ab" + written.text[:1])
    assert told[0] == (0, 8)
    assert told == sorted(told)
    assert told[-1] == (len(written.tokens), 8)


@pytest.mark.parametrize(
    ("stop", "text", "sure"),
    [
        (["end"], "the en", "the "),
        (["end"], "the e", "the "),
        (["end"], "them", "them"),
        (["x"], "axx", "axx"),
        (["aab", "b"], "caa", "c"),
        ([], "a", "a"),
    ],
)
def test_what_may_become_a_stop_string_is_held_back(stop, text, sure):
    assert without_start_of(stop, text) == sure
