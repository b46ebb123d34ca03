"""Check what an export says of special tokens, and what transformers finds in it in a new process."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch

from bd3_scale.checkpoint.manifest import read_manifest
from bd3_scale.checkpoint.model import open_model
from bd3_scale.checkpoint.source_ids import source_ids
from bd3_scale.convert.check_export import expectations, expected_logits, problems
from bd3_scale.convert.export import plan_export, run_export
from bd3_scale.convert.importer import plan_import, run_import
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.generate.text import checkpoint_tokenizer, stop_ids
from tests.convert.models import BYTES, QWEN_SHAPE, TIED, config, native_checkpoint, save_folder, tensors
from tests.convert.models import transformers_model as a_model

GENERATION = {"bos_token_id": 11, "eos_token_id": [256, 7], "pad_token_id": 9, "top_k": 20}


def with_begin(folder: Path, name: str = "Llama", rows: int = 300, **more) -> Path:
    """Return a next-token model whose tokeniser puts <|begin|>, id 257, before every text."""
    model = a_model(name, vocab_size=rows, **({"eos_token_id": 256, "bos_token_id": 257} | more))
    save_folder(folder, model, tokenizer=None)
    backend = tokenizers.Tokenizer.from_str(load_tokenizer("bytes")._backend.to_str())
    content = json.loads(backend.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "[MASK]"]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.add_special_tokens(["<|begin|>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", pair=None, special_tokens=[("<|begin|>", 257)]
    )
    backend.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|begin|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def there_and_back(source: Path, **how) -> Path:
    run_import(plan_import(source, **how), source.parent / "native")
    run_export(plan_export(source.parent / "native"), source.parent / "back", check=False)
    return source.parent / "back"


@pytest.mark.parametrize("rows", [258, 300])
@pytest.mark.parametrize("tied", [False, True])
def test_a_next_token_model_comes_back_without_the_mask_and_bitwise(rows: int, tied: bool, tmp_path: Path) -> None:
    """Check a vocabulary in which each row is a token, and one in which the new mask took an unused row."""
    source = with_begin(tmp_path / "model", rows=rows, tie_word_embeddings=tied)
    back = there_and_back(source)
    before, after = tensors(source), tensors(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tokenizer = tokenizers.Tokenizer.from_file(str(back / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 258 <= config(back)["vocab_size"]
    assert tokenizer.token_to_id("[MASK]") is None
    assert "mask_token" not in json.loads((back / "tokenizer_config.json").read_text())
    assert tokenizer.encode("a").ids == [257, 97]


def test_a_next_token_model_that_was_trained_here_cannot_favour_the_mask(tmp_path: Path) -> None:
    checkpoint = native_checkpoint(tmp_path / "native", TIED, BYTES, block_size=1, objective="next_token")
    run_export(plan_export(checkpoint), tmp_path / "out", check=False)
    assert config(tmp_path / "out")["vocab_size"] == 257
    assert len(tensors(tmp_path / "out")["model.embed_tokens.weight"]) == 257
    in_the_midst = BYTES.model_copy(update={"mask_id": 5})
    checkpoint = native_checkpoint(tmp_path / "b" / "native", TIED, in_the_midst, block_size=1, objective="next_token")
    run_export(plan_export(checkpoint), tmp_path / "other", check=False)
    rows = tensors(tmp_path / "other")["model.embed_tokens.weight"].double()
    others = torch.cat([rows[:5], rows[6:]])
    hidden = torch.randn(200, rows.shape[1], generator=torch.Generator().manual_seed(0)).double()
    logits = hidden @ rows.T
    assert torch.allclose(rows[5], others.mean(0), atol=1e-6)
    assert not (logits.argmax(1) == 5).any()


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_special_ids_are_the_sources_whatever_architecture_is_written(kind: str, tmp_path: Path) -> None:
    ids = {"bos_token_id": 11, "eos_token_id": 256, "pad_token_id": 9}
    source = save_folder(tmp_path / "model", a_model(kind, vocab_size=300, sliding_window=None, **ids))
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    back = there_and_back(source)
    assert ids.items() <= config(back).items()
    assert json.loads((back / "generation_config.json").read_text()) == GENERATION


def test_a_training_from_an_import_goes_on_with_its_ids(tmp_path: Path) -> None:
    """Check that the ids are in the tokeniser's folder, which a run copies."""
    source = save_folder(tmp_path / "model", a_model("Qwen3", vocab_size=300, pad_token_id=9, bos_token_id=None))
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    run_import(plan_import(source), tmp_path / "native")
    trained = native_checkpoint(tmp_path / "trained" / "c", QWEN_SHAPE, BYTES)
    shutil.copytree(tmp_path / "native" / "tokenizer", trained / "tokenizer", dirs_exist_ok=True)
    found = source_ids(trained)
    assert found == source_ids(tmp_path / "native")
    assert found.generation_config == GENERATION
    assert stop_ids(trained, read_manifest(trained)) == (7, 256)
    run_export(plan_export(trained), tmp_path / "out", check=False)
    assert config(tmp_path / "out")["architectures"] == ["SDARForCausalLM"]
    said = {key: config(tmp_path / "out")[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert said == {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 9}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == GENERATION
    assert not (tmp_path / "out" / "source_ids.json").exists()


def test_an_import_of_before_keeps_its_ids_and_begins_texts_with_nothing(tmp_path: Path) -> None:
    """Check an earlier import: its tokeniser's folder has no ids, and its manifest has no beginning token."""
    source = with_begin(tmp_path / "model", pad_token_id=9)
    run_import(plan_import(source), tmp_path / "native")
    assert read_manifest(tmp_path / "native").vocabulary.bos_id == 257
    manifest = read_manifest(tmp_path / "native")
    (tmp_path / "native" / "tokenizer" / "source_ids.json").unlink()
    assert source_ids(tmp_path / "native").config["pad_token_id"] == 9
    old = manifest.model_copy(update={"vocabulary": manifest.vocabulary.model_copy(update={"bos_id": None})})
    tokenizer = checkpoint_tokenizer(tmp_path / "native", old)
    assert tokenizer.encode_prompt("a") == [97]
    assert checkpoint_tokenizer(tmp_path / "native", manifest).encode_prompt("a") == [257, 97]


def test_what_texts_begin_with_can_be_chosen_at_the_import(tmp_path: Path) -> None:
    source = with_begin(tmp_path / "model")
    assert plan_import(source).vocabulary.bos_id == 257
    plain = plan_import(source, bos=False)
    assert plain.vocabulary.bos_id is None
    assert plain.tokenizer.encode_prompt("a") == [97]
    with pytest.raises(ValueError, match="declares no BOS"):
        plan_import(save_folder(tmp_path / "bytes", a_model("Llama", vocab_size=300)), bos=True)


def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    checkpoint = native_checkpoint(tmp_path / "native", QWEN_SHAPE, BYTES)
    before = os.umask(0o027)
    try:
        run_export(plan_export(checkpoint), tmp_path / "out", check=False)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o640}, modes


def test_each_kind_of_error_is_found(tmp_path: Path) -> None:
    """Check in this process, where transformers is imported; the next test uses a new one."""
    back = there_and_back(with_begin(tmp_path / "model"))
    native = tmp_path / "native"
    vocabulary = read_manifest(native).vocabulary
    tokenizer = checkpoint_tokenizer(native, read_manifest(native))
    with open_model(native) as (model, _, _):
        ids, logits = expected_logits(model, 1, 128)

    def found(tokenizer: Tokenizer = tokenizer, logits: torch.Tensor = logits) -> str:
        return next(problems(back, expectations(tokenizer, vocabulary, torch.float32), ids, logits), "")

    assert found() == ""
    assert "is tokenised as [257, 79, 110" in found(tokenizer.with_bos(None))
    assert "and in training as [79, 110" in found(tokenizer.with_bos(None))
    assert re.fullmatch(r"logits differ by \d+\.\d% of the largest", found(logits=logits.roll(1, 2)))
    assert found(logits=logits.where(logits > 0, torch.nan)).startswith("logits are not finite at other positions")
    more = tokenizers.Tokenizer.from_file(str(back / "tokenizer.json"))
    more.add_tokens([f"more {i}" for i in range(60)])
    more.save(str(back / "tokenizer.json"))
    assert found() == "the tokeniser has 318 ids, and the embedding 300 rows"


@pytest.mark.launch
def test_an_export_that_fails_its_check_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check also that the export's check runs no code from the working directory."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "json.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path / "here")
    checkpoint = native_checkpoint(tmp_path / "native", QWEN_SHAPE, BYTES)
    plan = plan_export(checkpoint)
    wrong = replace(plan, config=plan.config | {"rope_theta": 20.0})
    with pytest.raises(ValueError, match=r"logits differ"):
        run_export(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()
    broken = replace(plan, config=plan.config | {"hidden_act": "odd"})
    with pytest.raises(ValueError, match=r"is removed: .*hidden_act='odd' must be one of"):
        run_export(broken, tmp_path / "out")
