"""Check that an export can give the mask another id than training, where inference engines look for it."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bd3_scale.attention.spans import make_spans
from bd3_scale.checkpoint.model import open_model
from bd3_scale.cli import app
from bd3_scale.convert.export import plan_export, run_export
from bd3_scale.convert.importer import plan_import, run_import
from bd3_scale.convert.quantize import run_quantize
from bd3_scale.convert.quantizer import Scheme
from bd3_scale.convert.serving import ENGINE_MASK_ID
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.data.tokenizer_folder import write_tokenizer
from bd3_scale.observe.libraries import without_broken_torchvision
from bd3_scale.recipe.schema import DataRecipe
from tests.convert.models import BYTES, LLAMA_SHAPE, QWEN_SHAPE, TIED, config, native_checkpoint, sdar_folder, tensors
from tests.data.tokenisers import KINDS
from tests.data.tokenisers import write_tokenizer as write_kind
from tests.support.recipes import write_topics

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module", params=[QWEN_SHAPE, TIED], ids=["untied", "tied"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_checkpoint(tmp_path_factory.mktemp("native") / "native", request.param, BYTES)


@pytest.fixture(scope="module")
def moved(native: Path) -> Path:
    run_export(plan_export(native, mask_id=300), native.parent / "moved", check=False)
    return native.parent / "moved"


def test_rows_move_and_padding_never_has_the_highest_logit(native: Path, moved: Path) -> None:
    run_export(plan_export(native), native.parent / "plain", check=False)
    before, after = tensors(native.parent / "plain"), tensors(moved)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {EMBEDDING, HEAD}
    assert before[EMBEDDING].shape == (258, 48)
    assert after[EMBEDDING].shape == after[HEAD].shape == (301, 48)
    assert torch.equal(after[EMBEDDING][:257], before[EMBEDDING][:257])
    assert torch.equal(after[EMBEDDING][300], before[EMBEDDING][257])
    assert not after[EMBEDDING][257:300].any()
    assert torch.equal(after[HEAD][:257], before[HEAD][:257])
    mean = before[HEAD][:257].double().mean(0)
    assert torch.allclose(after[HEAD][257:].double(), mean.expand(44, -1), atol=1e-6), "the mean of the tokens' logits"
    hidden = torch.randn(2000, 48, generator=torch.Generator().manual_seed(0))
    assert ((hidden @ after[HEAD].T).argmax(1) < 257).all()


def test_what_the_folder_says_of_it(moved: Path) -> None:
    said = config(moved)
    assert (said["vocab_size"], said["mask_token_id"], said["num_token_ids"]) == (301, 300, 257)
    assert said["eos_token_id"] == said["pad_token_id"] == 256
    card = (moved / "README.md").read_text()
    assert "The mask has the id 300, and had 257 in training" in card
    assert "43 rows that no text uses" in card
    # With random weights in the head, the masks' logits are not alike.
    assert re.search(
        r"softmax: padding takes 0\.\d+ of the probability in the median .* has the mean of .*, since", card
    )
    assert "generated text alone, as no other was read (FileNotFoundError: unused/manifest.json" in card


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose masked tokens look alike, as after training: the mask's embedding is the largest."""
    folder = tmp_path_factory.mktemp("alike")
    weights = load_file(sdar_folder(folder / "source") / "model.safetensors")
    weights[EMBEDDING][257] *= 32
    save_file(weights, folder / "source" / "model.safetensors")
    run_import(plan_import(folder / "source"), folder / "native")
    return folder


def masked_logits(folder: Path, mask_id: int) -> torch.Tensor:
    """Return what the folder's own code computes at masks in the last block, after text and repetitions, [M, rows]."""
    generator = torch.Generator().manual_seed(11)
    package = ModuleType(folder.name)
    package.__path__ = [str(folder)]
    found = []
    with pytest.MonkeyPatch.context() as patch, without_broken_torchvision(), torch.no_grad():
        patch.setitem(sys.modules, package.__name__, package)
        code = importlib.import_module(f"{folder.name}.modeling_sdar")
        model = code.SDARForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        for length in (4, 20, 100):
            ids = torch.randint(0, 257, (200, length), generator=generator)
            ids[:50] = ids[:50, :1]
            masked = torch.rand(ids.shape, generator=generator) < torch.rand(200, 1, generator=generator)
            masked[:, :-4] = False
            found.append(model(ids.masked_fill(masked, mask_id)).logits[masked].double())
    return torch.cat(found)


@pytest.mark.slow
def test_padding_of_a_trained_model_takes_no_probability(alike: Path) -> None:
    padding = run_export(plan_export(alike / "native", dtype="bfloat16", mask_id=9000), alike / "far", check=False)
    run_export(plan_export(alike / "native", dtype="bfloat16"), alike / "plain", check=False)
    assert padding is not None
    assert padding.median is not None
    head, plain = tensors(alike / "far")[HEAD], tensors(alike / "plain")[HEAD]
    assert torch.equal(head[:257], plain[:257])
    assert torch.equal(head[257:], padding.row.expand(8744, -1))
    logits = masked_logits(alike / "far", 9000)
    assert logits.shape[1] == 9001
    shares = logits.softmax(1)[:, 257:].sum(1)
    assert (logits.argmax(1) < 257).all()
    assert shares.median() < 1e-6
    assert shares.max() < 1e-4
    assert 0.01 < shares.median() / padding.median < 100, "as it is told"
    with_mean = torch.cat([logits[:, :257], logits[:, :257].mean(1, keepdim=True).expand(-1, 8744)], 1)
    assert with_mean.softmax(1)[:, 257:].sum(1).median() > 0.5
    card = (alike / "far" / "README.md").read_text()
    assert f"softmax: {padding.summary}.\n" in card
    assert "the mean" not in card


def test_a_model_that_does_not_fit_in_memory_keeps_the_mean(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bd3_scale.convert.padding.available_bytes", lambda: 10**5)
    padding = run_export(plan_export(native, mask_id=300), tmp_path / "out", check=False)
    assert padding is not None
    assert (padding.row, padding.median) == (None, None)
    assert "since the model in fp32 takes 0.0 GB, and 0.0 GB of memory are left" in padding.summary
    head = tensors(tmp_path / "out")[HEAD]
    assert torch.allclose(head[257:], head[:257].mean(0).expand(44, -1), atol=1e-6)


@pytest.mark.slow
def test_a_run_s_text_is_measured_on_and_a_quantised_export_has_such_rows(
    alike: Path, native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare([write_topics(tmp_path / "text")], tmp_path / "unused", load_tokenizer("bytes"), 128, holdout=0.2)
    monkeypatch.chdir(tmp_path)
    padding = run_export(plan_export(native, mask_id=300), tmp_path / "out", check=False)
    assert padding is not None
    assert "masked tokens of held-out and generated text: each padding row" in padding.summary
    plan = plan_export(alike / "native", dtype="bfloat16", mask_id=3000)
    counts = {"calibration_sequences": 4, "evaluation_sequences": 4, "draws": 1}
    data = DataRecipe(path="unused", seq_len=128)
    report = run_quantize(plan, tmp_path / "int8", Scheme(bits=8, group_size=16), "rtn", data, **counts)
    assert report.padding is not None
    assert "the mean" not in report.padding
    head = tensors(tmp_path / "int8")[HEAD]
    assert (head[257:] == head[257]).all()
    assert (head[257].float() - head[:257].float().mean(0)).norm() > 1
    assert report.padding in (tmp_path / "int8" / "README.md").read_text()


def test_padding_with_the_mask_goes_with_it(tmp_path: Path) -> None:
    source = sdar_folder(tmp_path / "sdar", pad_token_id=257)
    said = {"eos_token_id": [256, 3], "pad_token_id": 257, "top_k": 257}
    (source / "generation_config.json").write_text(json.dumps(said))
    run_import(plan_import(source), tmp_path / "native")
    run_export(plan_export(tmp_path / "native", mask_id=300), tmp_path / "moved", check=False)
    assert config(tmp_path / "moved")["pad_token_id"] == config(tmp_path / "moved")["mask_token_id"] == 300
    found = json.loads((tmp_path / "moved" / "generation_config.json").read_text())
    assert found == said | {"pad_token_id": 300}


def test_its_own_code_computes_the_same_and_draws_no_padding(native: Path, moved: Path) -> None:
    ids = torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(1))
    masked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    package = ModuleType("moved")
    package.__path__ = [str(moved)]
    with pytest.MonkeyPatch.context() as patch, without_broken_torchvision(), torch.no_grad():
        patch.setitem(sys.modules, package.__name__, package)
        code = importlib.import_module("moved.modeling_sdar")
        exported = code.SDARForCausalLM.from_pretrained(moved, dtype=torch.float32).eval()
        with open_model(native) as (model, _, _):
            spans = make_spans(torch.zeros(ids.shape, dtype=torch.int32), 4)
            positions = torch.arange(21).expand(2, -1)
            expected = model.clean_logits(ids.masked_fill(masked, 257), positions, spans)
        found = exported(ids.masked_fill(masked, 300)).logits
        torch.testing.assert_close(found[..., :257], expected[..., :257], rtol=0, atol=1e-5)
        # The temperature is so high that every possible id is drawn.
        drawn = exported.generate(ids, max_new_tokens=120, temperature=1e3, eos_token_id=[])
    assert drawn.shape == (2, 141)
    assert drawn.max() < 257


@pytest.mark.parametrize("name", ["byte-level", "chat", "llama-2", "llama-3"])
def test_a_tokeniser_keeps_all_other_ids(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_kind(tmp_path / "source", KINDS[name])
    tokenizer = load_tokenizer(source)
    for folder, mask_id in (("plain", None), ("moved", 1000)):
        (tmp_path / folder).mkdir()
        write_tokenizer(tokenizer, source, tmp_path / folder, mask_id=mask_id)
    plain, moved = (tokenizers.Tokenizer.from_file(str(tmp_path / f / "tokenizer.json")) for f in ("plain", "moved"))
    mask = json.loads((tmp_path / "moved" / "tokenizer_config.json").read_text())["mask_token"]
    assert moved.token_to_id(mask) == 1000
    old = plain.get_vocab()
    assert {token: moved.token_to_id(token) for token in old} == old | {mask: 1000}
    assert moved.get_vocab_size() == 1001
    eos = tokenizer.name_of(tokenizer.vocabulary.eos_id)
    for text in ("The keeper wrote its name down.", f"a{eos}b", "[unused 999]", "  two\n\tlines", "x [MASK"):
        assert moved.encode(text).ids == plain.encode(text).ids
    assert mask in moved.encode(f"a{mask}").tokens
    moved.to_str()
    assert capfd.readouterr().out == "", "the library tells of ids without a token"


def test_a_tokeniser_without_places_is_refused(tmp_path: Path) -> None:
    source = write_kind(tmp_path / "source", KINDS["unigram"])
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="of the kind Unigram, which numbers tokens by their position"):
        write_tokenizer(load_tokenizer(source), source, tmp_path / "out", mask_id=1000)


@pytest.mark.parametrize(
    ("mask_id", "reason"),
    [
        (100, r"mask_id=100 must be at least 258, the size of the vocabulary"),
        (1 << 24, r"and below 16777216"),
    ],
)
def test_ids_of_tokens_and_absurd_ones_are_refused(mask_id: int, reason: str, native: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        plan_export(native, mask_id=mask_id)


def test_where_the_mask_stays(native: Path, tmp_path: Path) -> None:
    assert plan_export(native, mask_id=257) == plan_export(native)
    with pytest.raises(ValueError, match=r"mask_id=300 is for SDARForCausalLM.* an export to Bd3ForCausalLM"):
        plan_export(native, "bd3", mask_id=300)
    among = native_checkpoint(tmp_path / "a" / "native", LLAMA_SHAPE, BYTES)
    with pytest.raises(ValueError, match="an export to Bd3ForCausalLM: leave it out"):
        plan_export(among, mask_id=300)
    among = native_checkpoint(tmp_path / "b" / "native", QWEN_SHAPE, BYTES.model_copy(update={"mask_id": 5}))
    with pytest.raises(ValueError, match=r"would move the mask from 5, which lies among the 258 ids"):
        plan_export(among, mask_id=300)


def test_it_is_no_model_to_import(moved: Path) -> None:
    with pytest.raises(ValueError, match="mask_token_id=300, behind the 257 ids in use: it was"):
        plan_import(moved)


def test_the_command_line_tells_what_it_costs(native: Path, tmp_path: Path) -> None:
    def run(*options: object):
        arguments = ("convert", "export", native, "--out", tmp_path / "out", "--mask-id", ENGINE_MASK_ID, *options)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    found = json.loads(run("--dry-run", "--json").output)
    rows = 151670 - 258
    assert found["mask"] == "151669, 257 in training"
    assert found["padding"].startswith(f"{rows * 48 * 4 * 2:,} bytes: 151,670 rows of embedding and head")
    assert found["bytes"] == plan_export(native).num_bytes + rows * 48 * 4 * 2
    assert found["SGLang"].startswith("runs it: the mask has the id 151669")
    assert not (tmp_path / "out").exists()
    assert "--mask-id 151669 is for Hugging Face folders" in str(run("--format", "gguf").exception)


@pytest.mark.slow
@pytest.mark.launch
def test_an_export_for_engines_is_checked_whole(native: Path, tmp_path: Path) -> None:
    run_export(plan_export(native, mask_id=ENGINE_MASK_ID), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("--dllm-algorithm-config sglang.yaml", "--max-running-requests", "--dllm-block-length 4"):
        assert words in card
