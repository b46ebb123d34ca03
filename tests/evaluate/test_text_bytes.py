"""Count the bytes of measured tokens: in whole and cut documents, and for models that do not predict every token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bd3_scale.data.prepare import prepare
from bd3_scale.data.stream import held_out_batches
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.evaluate.text_statistics import counted_bytes
from bd3_scale.objective import NextToken
from bd3_scale.recipe.schema import DataRecipe, DiffusionRecipe

BYTES = load_tokenizer("bytes")
TEXTS = {"ascii": "The lock and the mill. " * 20, "three bytes a letter": "日本語の文章。" * 30}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_bytes_are_those_of_the_text_whatever_cuts_it(text: str, tmp_path: Path) -> None:
    texts = [text[: len(text) - 7 * number] for number in range(5)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    options = {"holdout": 1.0, "document_multiple": 8, "workers": 1, "progress": False}
    manifest = prepare([tmp_path / "t.jsonl"], tmp_path / "data", BYTES, 64, **options)
    recipe = DataRecipe(path=str(tmp_path / "data"), seq_len=64)

    def batches(sequences: int | None = None):
        share = {"batch_size": 3, "dp_rank": 0, "dp_size": 1, "sequences": sequences}
        return held_out_batches(recipe, manifest, **share)

    total = sum(len(one.encode()) for one in texts)
    assert counted_bytes(batches(), BYTES) == total == manifest.validation.text_bytes
    for sequences in (1, 3, 5):
        ids = [i for b in batches(sequences) for i in b.tokens[b.counted].tolist()]
        whole = BYTES.decode(ids).rstrip("\ufffd").replace("<|endoftext|>", "")
        assert counted_bytes(batches(sequences), BYTES) == len(whole.encode())
    # A next-token model does not count the first token of each piece: a byte, or the letter that it completes.
    ar = NextToken(DiffusionRecipe(block_size=1, objective="next_token"), BYTES.vocabulary)
    found = counted_bytes(batches(), BYTES, lambda batch: ar.counting(batch).counted)
    first = sum(
        int(((b.tokens < 256) & (torch.arange(64) == b.document_start)).sum()) for b in batches()
    )  # a piece may consist of the end token
    assert total - 3 * first <= found <= total
    if text.isascii():
        assert found == total - first
