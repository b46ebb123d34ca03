"""Check text in and out of the sampler: prompts, gaps, stop strings, and when a text counts as stuck."""

from __future__ import annotations

import math

import pytest

from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.generate.writer import encode_prompt, kept_tokens, without_partial_characters
from tests.support.recipes import tiny_recipe

BYTES = load_tokenizer("bytes")


def test_the_mask_is_text_unless_gaps_are_asked_for():
    text = "a[MASK][MASK]b[MASK]"
    assert BYTES.vocabulary.mask_id not in encode_prompt(BYTES, text, infill=False)
    mask = BYTES.vocabulary.mask_id
    assert encode_prompt(BYTES, text, infill=True) == [97, mask, mask, 98, mask]
    with pytest.raises(ValueError, match=r"--infill fills the \[MASK\] of a prompt, but 'abc' has none"):
        encode_prompt(BYTES, "abc", infill=True)


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [("a stop. b", ["stop"], 6), ("aéb", ["é"], 3), ("abc", ["x"], None), ("xx", ["x", "xx"], 1), ("abc", [], None)],
)
def test_a_stop_string_keeps_the_fewest_tokens_that_hold_it(text, stop, kept):
    assert kept_tokens(BYTES, [], list(text.encode()), stop) == kept


def test_a_byte_model_is_stuck_below_three_quarters_of_the_median_of_its_held_out_text(tmp_path, monkeypatch):
    from bd3_scale.checkpoint.manifest import CheckpointManifest
    from bd3_scale.data.prepare import prepare
    from bd3_scale.generate.text import default_min_entropy
    from bd3_scale.recipe.schema import Recipe

    (tmp_path / "t.txt").write_text("abcdefg" * 400)  # at the end 255 letters and EOS; elsewhere one letter
    options = {"document_multiple": 8, "workers": 1, "progress": False, "holdout": 1.0}
    prepare([tmp_path / "t.txt"], tmp_path / "data", BYTES, 64, **options)
    recipe = Recipe.model_validate(tiny_recipe(data={"path": str(tmp_path / "data")}))
    manifest = CheckpointManifest.of_run(recipe, step=1, vocabulary=BYTES.vocabulary, states=())
    assert default_min_entropy(manifest) == pytest.approx(0.75 * math.log(7), rel=1e-3)
    gone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": str(tmp_path / "gone")})})
    assert default_min_entropy(CheckpointManifest.of_run(gone, step=1, vocabulary=BYTES.vocabulary, states=())) == 0.0
    words = BYTES.vocabulary.model_copy(update={"size": 5000})
    assert default_min_entropy(manifest.model_copy(update={"vocabulary": words})) == 4.0


def test_a_character_whose_bytes_are_masked_is_not_shown_while_it_settles():
    content, mask = list("a日b".encode()), BYTES.vocabulary.mask_id
    shown = []
    for count in range(len(content) + 1):
        shown.append(without_partial_characters(BYTES.text_of(content[:count] + [mask] * (len(content) - count))))
    assert [text.replace("[MASK]", "") for text in shown] == ["", "a", "a", "a", "a日", "a日b"]
    assert [text.count("[MASK]") for text in shown] == [5, 4, 3, 2, 1, 0]
