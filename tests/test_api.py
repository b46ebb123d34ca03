"""Check that `bd3_scale.load` does in one line what the commands do, and leaves nothing behind in the process."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import bd3_scale
from bd3_scale.checkpoint.manifest import read_manifest, write_manifest
from bd3_scale.convert.export import plan_export, run_export
from bd3_scale.evaluate.checkpoint import evaluate_checkpoint
from bd3_scale.evaluate.sets import NamedText
from tests.conftest import TESTS

RUN = TESTS / "fixtures" / "format-3"
CHECKPOINT = Path("run/checkpoints/step-00000006")
EXPECTED = json.loads((RUN / "expected.json").read_text())
TEXTS = ["A text of more than one block.", "Another, which ends\nlater: " + "so long " * 20, "Short."]


@pytest.fixture(autouse=True)
def in_the_run_s_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RUN)


@pytest.fixture(scope="module")
def model() -> bd3_scale.Model:
    return bd3_scale.load(RUN / "run")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "sdar"
    run_export(plan_export(RUN / CHECKPOINT, "sdar"), folder, check=False)
    return folder


@pytest.fixture(scope="module")
def next_token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with the same weights whose manifest says that it predicts the next token."""
    checkpoint = tmp_path_factory.mktemp("next") / "step-00000006"
    shutil.copytree(RUN / CHECKPOINT, checkpoint)
    manifest = read_manifest(checkpoint)
    (checkpoint / "manifest.json").unlink()
    changed = {"objective": "next_token", "fills_masks": False, "block_size": 1}
    write_manifest(checkpoint, manifest.model_copy(update=changed), {})
    return checkpoint


def test_it_writes_what_the_command_wrote(model: bd3_scale.Model) -> None:
    for temperature, unmasking in ((0, "static"), (1, "first-hitting")):
        how = {"max_new_tokens": 24, "temperature": temperature, "unmasking": unmasking}
        written = model.generate("The ", **how)
        assert written.tokens == EXPECTED[f"text_at_temperature_{temperature}"]
        first, second = model.generate(["The ", "A"], **how)
        assert (first.tokens, second.prompt) == (written.tokens, "A")
        pieces = list(model.stream("The ", **how))
        assert len(pieces) == 4  # blocks of 8, from the prompt's 4 tokens on
        assert "".join(piece.text for piece in pieces) == written.text
        assert [piece.stopped_by for piece in pieces] == [None, None, None, "length"]
    assert model.generate("", max_new_tokens=9, temperature=0, stop='""').text == ""
    filled = model.generate("The [MASK]nd.", infill=True, max_new_tokens=0, temperature=0)
    assert (filled.text, filled.tokens) == ('The "nd.', [])


def test_texts_are_measured_as_the_command_measures_a_file_of_them(model: bd3_scale.Model, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *TEXTS]))
    (said,) = evaluate_checkpoint(CHECKPOINT, texts=[NamedText.parse(str(file))], draws=3)
    found = model.nelbo(["", *TEXTS], draws=3)
    assert found.padded_nelbo is not None
    assert replace(found, checkpoint="", text="") == replace(said, checkpoint="", text="")
    # The bytes of a text and its end.
    alone = [model.nelbo(text, block_size=1) for text in TEXTS]
    assert [each.tokens for each in alone] == [len(text) + 1 for text in TEXTS]
    assert model.nelbo(TEXTS, block_size=1).tokens == sum(each.tokens for each in alone)


def test_the_logits_of_a_mask_after_each_beginning_make_the_likelihood(model: bd3_scale.Model) -> None:
    text, vocabulary = TEXTS[0], model.manifest.vocabulary
    ids = [*model.tokenizer.encode(text), vocabulary.eos_id]
    nats = []
    for place, token in enumerate(ids):
        logits = model.logits([*ids[:place], vocabulary.mask_id], block_size=1)
        assert logits.shape == (1, place + 1, vocabulary.size)
        assert logits.dtype == torch.float32
        nats.append(-float(logits[0, -1].double().log_softmax(-1)[token]))
    found = model.nelbo(text, block_size=1)
    assert found.exact
    assert found.nelbo == pytest.approx(sum(nats) / len(ids), rel=1e-6)


def test_the_logits_of_a_masked_last_block_are_what_generate_draws_from(model: bd3_scale.Model) -> None:
    mask = model.manifest.vocabulary.mask_id
    ids = model.tokenizer.encode("sixteen letters.")
    logits = model.logits([*ids, *[mask] * 8])
    assert (logits[..., mask] == -torch.inf).all()
    once = model.generate("sixteen letters.", max_new_tokens=8, temperature=0, unmasking="static", steps=1)
    assert once.tokens == logits[0, 16:].argmax(-1).tolist()
    # A block does not see what follows it.
    assert torch.equal(logits[:, :16], model.logits(torch.tensor([ids, ids]))[:1])


def test_an_exported_folder_is_the_model_that_it_was_made_of(model: bd3_scale.Model, exported: Path) -> None:
    before = sorted(Path(tempfile.gettempdir()).glob("bd3_scale-import-*"))
    other = bd3_scale.load(exported)
    assert sorted(Path(tempfile.gettempdir()).glob("bd3_scale-import-*")) == before
    ids = torch.randint(0, 256, (3, 30), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": 20, "seed": 3}
    # Two models are used in turns.
    for _ in range(2):
        assert torch.equal(other.logits(ids), model.logits(ids))
        assert other.generate("The ", **how).tokens == model.generate("The ", **how).tokens
        assert other.nelbo(TEXTS).nelbo == model.nelbo(TEXTS).nelbo
    assert other.config["block_size"] == model.config["block_size"] == 8
    assert other.config["model"]["hidden_size"] == 16
    with torch.no_grad():
        next(other.transformer.parameters()).zero_()
    assert not torch.equal(other.logits(ids), model.logits(ids))


def test_a_conversation_is_answered_by_the_folder_s_template(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(exported, folder)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    (folder / "chat_template.jinja").write_text(template)
    model = bd3_scale.load(str(folder))
    talk = [{"role": "user", "content": "Hello"}]
    how = {"max_new_tokens": 8, "temperature": 0}
    one = model.generate(talk, **how)
    many = model.generate([talk, "Hello"], **how)
    assert one.prompt == many[0].prompt == "user: Hello\nassistant:"
    assert (one.tokens, many[1].prompt) == (many[0].tokens, "Hello")


def test_it_touches_no_process_group(model: bd3_scale.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"max_new_tokens": 12, "seed": 1, "min_entropy": 0}
    ids = [[1, 2, 3, 4]]
    expected = model.generate("The ", **how).tokens, model.nelbo(TEXTS).nelbo, model.logits(ids)
    assert not dist.is_initialized()
    # This process is one of two ranks of the user's training; the other rank does nothing here.
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mine = dist.group.WORLD
        dist.barrier()
        before = mine._get_sequence_number_for_group()
        for each in (model, bd3_scale.load("run")):
            assert each.generate("The ", **how).tokens == expected[0]
            assert each.nelbo(TEXTS).nelbo == expected[1]
            assert torch.equal(each.logits(ids), expected[2])
        assert dist.group.WORLD is mine
        assert mine._get_sequence_number_for_group() == before  # counts collectives
        dist.barrier()
        assert mine._get_sequence_number_for_group() > before
        with pytest.raises(ValueError, match=r"min_entropy has no default .* among several processes"):
            bd3_scale.load("run").generate("The ")
    finally:
        dist.destroy_process_group()
    assert torch.equal(bd3_scale.load("run").logits(ids), expected[2])
    assert not dist.is_initialized()


def test_loading_leaves_a_notebook_s_warnings_and_shows_none(recwarn: pytest.WarningsRecorder) -> None:
    filters = list(warnings.filters)
    model = bd3_scale.load("run", dtype=torch.bfloat16, device="cpu")
    assert list(warnings.filters) == filters
    assert [str(warning.message) for warning in recwarn] == []
    assert repr(model) == (
        "<bd3_scale model 'format-3', step 6: block_diffusion, blocks of 8, 8,512 parameters in bfloat16 on cpu>"
    )


def test_a_model_of_next_tokens_measures_and_does_not_write(next_token: Path) -> None:
    model = bd3_scale.load(next_token)
    for refused in (model.generate, model.stream):
        with pytest.raises(ValueError, match=r"step-00000006 was trained for next_token and fills no masks"):
            refused("The ")
    ids = [*model.tokenizer.encode(TEXTS[0]), model.manifest.vocabulary.eos_id]
    law = model.logits(ids)[0, :-1].double().log_softmax(-1)
    nats = -law.gather(1, torch.tensor(ids)[1:, None]).mean()
    found = model.nelbo(TEXTS[0])
    assert (found.exact, found.tokens) == (True, len(ids) - 1)
    assert found.nelbo == pytest.approx(float(nats), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda path: None, FileNotFoundError, "nothing does not exist: give a run directory, a checkpoint or a"),
        (lambda path: path.mkdir(), ValueError, "nothing holds no model: it is neither a checkpoint"),
        (
            lambda path: (path.mkdir(), (path / "config.json").write_text("{}")),
            ValueError,
            "nothing cannot be read as a model: architecture None is not supported",
        ),
    ],
    ids=["nothing", "an empty folder", "no model"],
)
def test_what_is_no_model_is_refused(tmp_path: Path, make, error, words: str) -> None:
    make(tmp_path / "nothing")
    with pytest.raises(error, match=words):
        bd3_scale.load(tmp_path / "nothing")


def test_a_folder_without_weights_is_refused(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(FileNotFoundError, match="bare"):
        bd3_scale.load(tmp_path / "bare")


def test_mistakes_are_told(model: bd3_scale.Model) -> None:
    with pytest.raises(TypeError, match="temprature"):
        model.generate("The ", temprature=0)
    with pytest.raises(ValueError, match=r"temperature is -1"):
        model.generate("The ", temperature=-1)
    with pytest.raises(ValueError, match=r"the text has 2 tokens, less than one block of 8"):
        model.nelbo("A")
    with pytest.raises(ValueError, match="there is no text to measure"):
        model.nelbo(["", " "])
    with pytest.raises(ValueError, match="draws is 0"):
        model.nelbo(TEXTS, draws=0)
    with pytest.raises(ValueError, match=r"ids \[258, -1\] are not in this vocabulary of 258"):
        model.logits([1, 258, -1])
    with pytest.raises(ValueError, match=r"ids have shape \(1, 1, 2\)"):
        model.logits([[[1, 2]]])
