"""Check conversations and texts with a beginning token: through preparation, training, export and sampling."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import yaml

from bd3_scale.data.tokenizer import load_tokenizer
from tests.convert.test_special_ids import with_begin
from tests.data.test_prepare import read
from tests.support import forks
from tests.support.recipes import tiny_recipe, write_recipe, write_topics
from tests.support.runs import losses

BEGIN = 257
ONE = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 1, "ffn_hidden_size": 32}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begin")
    with_begin(folder / "model", num_hidden_layers=2)
    write_topics(folder / "text")
    draw = random.Random(1)
    lines = []
    for _ in range(60):
        words = ["".join(draw.choices("abcd ", k=draw.randint(1, 40))) for _ in range(4)]
        turns = [{"role": role, "content": word} for role, word in zip(["user", "assistant"] * 2, words, strict=True)]
        lines.append(json.dumps({"messages": turns[: draw.choice([2, 3, 4])]}))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "model" / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    options = ["--tokenizer", "model", "--seq-len", 64, "--workers", 1]
    forks.bd3_scale("data", "prepare", "text", "--out", "topics", *options, "--holdout", 0.2, cwd=folder)
    forks.bd3_scale("data", "prepare", "chats.jsonl", "--messages", "--out", "chats", *options, cwd=folder)
    return folder


def test_a_loss_of_all_masked_is_the_likelihood_of_all_but_what_is_shown(workplace: Path) -> None:
    """Check documents that fill their blocks, at block size 1: training's loss equals the exact evaluation."""
    texts = ["".join(random.Random(seed).choices("abcdefgh ", k=30)) for seed in range(8)]
    (workplace / "full.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--tokenizer", "model", "--seq-len", 64, "--workers", 1, "--validation", "full.jsonl"]
    forks.bd3_scale("data", "prepare", "full.jsonl", "--out", "full", *options, cwd=workplace)
    manifest = json.loads((workplace / "full" / "manifest.json").read_text())
    assert manifest["train"]["counted_tokens"] == 8 * 31
    assert manifest["train"]["shown_tokens"] == 8
    write_recipe(
        workplace / "full.yaml",
        model=ONE,
        diffusion={"block_size": 1, "mask_rate_low": 1.0, "mask_rate_high": 1.0},
        data={"path": "full"},
        optimizer={"lr": 1e-30, "ema_decay": 0.0, "weight_decay": 0.0},
        train={"steps": 1, "global_batch_size": 4, "micro_batch_size": 2},
        run_dir="full-run",
    )
    forks.bd3_scale("train", "full.yaml", cwd=workplace)
    (found,) = json.loads(forks.bd3_scale("evaluate", "full-run", "--json", cwd=workplace))
    assert found["exact"]
    assert found["tokens"] == 8 * 31
    assert losses(workplace / "full-run")[1][0] == pytest.approx(found["nelbo"], rel=1e-6)


@pytest.mark.parametrize("data", ["topics", "chats"])
def test_every_layout_divides_by_the_same_number_of_tokens(data: str, workplace: Path) -> None:
    """Check ranks whose sequences show different numbers of tokens."""
    recipe = {
        "model": ONE | {"num_query_groups": 2},
        "diffusion": {"block_size": 4, "block_size_choices": [4, 8], "mask_rate_low": 0.2, "noisy_copies": 2},
        "data": {"path": data},
        "optimizer": {"eps": 1e-4, "ema_decay": 0.0},
        "train": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 1},
        "evaluation": {"every_steps": 0, "sequences": 4},
    }
    found = []
    for name, parallel in {"one": {}, "data": {}, "tensor": {"tensor": 2}, "context": {"context": 2}}.items():
        launch = {"processes": 1 if name == "one" else 2}
        run = f"{data}-{name}"
        write_recipe(workplace / f"{run}.yaml", **recipe, parallel=parallel, launch=launch, run_dir=run)
        forks.bd3_scale("train", f"{run}.yaml", cwd=workplace)
        found.append(losses(workplace / run))
    for other in found[1:]:
        for step, values in found[0].items():
            assert other[step] == pytest.approx(values, rel=1e-5)


LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("served", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("served", trust_remote_code=True, dtype=torch.float32).eval()
ids = tokenizer("The lock", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=12, unmasking="static", steps=8, temperature=0.0, eos_token_id=[])
print(json.dumps([ids[0].tolist(), out[0, ids.shape[1]:].tolist(), model.config.bos_token_id]))
"""


def test_a_model_that_begins_texts_is_adapted_exported_and_writes_the_same(workplace: Path) -> None:
    recipe = tiny_recipe(
        name="adapted",
        diffusion={"block_size": 8},
        data={"path": "adapted-data"},
        optimizer={"lr": 3e-3},
        train={"steps": 4, "global_batch_size": 4, "micro_batch_size": 4},
        run_dir="adapted",
    )
    del recipe["model"]
    (workplace / "adapt.yaml").write_text(yaml.safe_dump(recipe))
    text = ["--text", "text", "--validation", "text/assert.txt"]
    forks.bd3_scale("adapt", "model", "adapt.yaml", *text, "launch.processes=1", cwd=workplace)
    assert json.loads((workplace / "adapted-data" / "manifest.json").read_text())["vocabulary"]["bos_id"] == BEGIN
    forks.bd3_scale("convert", "export", "adapted", "--out", "served", "--dtype", "float32", cwd=workplace)
    script = workplace / "load.py"
    script.write_text(LOAD)
    done = forks.run([sys.executable, script], cwd=workplace)
    assert done.returncode == 0, done.stderr
    ids, tokens, bos_id = json.loads(done.stdout.splitlines()[-1])
    assert (bos_id, ids) == (BEGIN, [BEGIN, *b"The lock"])
    assert ids == load_tokenizer(workplace / "adapted" / "tokenizer").encode_prompt("The lock")
    options = ["--prompt", "The lock", "--temperature", 0, "--unmasking", "static", "--min-entropy", 0, "--json"]
    written = json.loads(forks.bd3_scale("generate", "adapted", *options, "--max-new-tokens", 12, cwd=workplace))
    end = written["tokens"]
    assert tokens[: len(end)] == end
    assert len(end) == 12 or tokens[len(end)] == 256


@pytest.mark.slow
def test_a_run_has_the_template_that_its_conversations_were_written_by(workplace: Path) -> None:
    """Check a model that has its own template, which is kept only where the data have no conversations."""
    begun = {"model": ONE, "train": {"steps": 1}}
    write_recipe(workplace / "first.yaml", **begun, data={"path": "topics"}, run_dir="first")
    forks.bd3_scale("train", "first.yaml", cwd=workplace)
    assert not list(workplace.glob("first/**/chat_template.jinja")), "none was trained"
    for folder in ("first/tokenizer", *(str(path) for path in (workplace / "first").glob("checkpoints/*/tokenizer"))):
        (workplace / folder / "chat_template.jinja").write_text("{{ other }}")
    for data in ("chats", "topics"):
        run = f"then-{data}"
        write_recipe(workplace / f"{run}.yaml", **begun, data={"path": data}, init_from="first", run_dir=run)
        forks.bd3_scale("train", f"{run}.yaml", cwd=workplace)
        found = (workplace / run / "tokenizer" / "chat_template.jinja").read_text()
        expected = (workplace / "model" / "chat_template.jinja").read_text() if data == "chats" else "{{ other }}"
        assert found == expected


def test_a_chat_is_the_text_of_the_template_and_data_that_lie_there_say_what_differs(workplace: Path) -> None:
    from transformers import AutoTokenizer

    for data in ("chats", "topics"):
        run = f"said-{data}"
        write_recipe(workplace / f"{run}.yaml", model=ONE, data={"path": data}, train={"steps": 1}, run_dir=run)
        forks.bd3_scale("train", f"{run}.yaml", cwd=workplace)
    theirs = AutoTokenizer.from_pretrained(workplace / "model")
    message = [{"role": "user", "content": "abc"}]
    options = ["--chat", "--prompt", "abc", "--max-new-tokens", 2, "--json"]
    written = json.loads(forks.bd3_scale("generate", "said-chats", *options, cwd=workplace))
    prompt = theirs.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert written["prompt"] == prompt == "<|begin|>user: abc<|endoftext|>assistant: "
    ids = load_tokenizer(workplace / "said-chats" / "tokenizer").encode_special(prompt)
    assert ids == theirs.apply_chat_template(message, add_generation_prompt=True)
    (workplace / "asked.jsonl").write_text(json.dumps({"messages": message}) + "\n")
    again = forks.bd3_scale(
        "generate", "said-chats", "--messages", "asked.jsonl", "--max-new-tokens", 2, "--json", cwd=workplace
    )
    assert json.loads(again)["tokens"] == written["tokens"]
    said = forks.bd3_scale("generate", "said-topics", *options, cwd=workplace, returncode=2)
    assert "has no chat template: put a chat_template.jinja into it" in said
    prepare = ["data", "prepare", "text", "--out", "topics", "--tokenizer", "model", "--workers", 1, "--holdout", 0.2]
    said = forks.bd3_scale(*prepare, "--seq-len", 128, "--no-bos", cwd=workplace, returncode=2)
    assert "seq_len is 128, there 64\n" in said
    assert "documents begin with nothing, there with the id 257\n" in said
    said = forks.bd3_scale(*prepare, "--seq-len", 64, cwd=workplace, returncode=2)
    assert "topics holds these data already" in said


def test_data_of_another_beginning_are_named_with_the_way_out(workplace: Path) -> None:
    """Check an older import: its tokeniser begins texts, and the manifest of its data names no beginning token."""
    from bd3_scale.checkpoint.manifest import read_manifest
    from bd3_scale.data.manifest import check_tokenizer, load_manifest
    from bd3_scale.recipe.load import load_recipe
    from bd3_scale.train.resume import check_initial

    imported = workplace / "imported"
    forks.bd3_scale("convert", "import", "model", "--out", "imported", cwd=workplace)
    new = read_manifest(imported)
    old = new.model_copy(update={"vocabulary": new.vocabulary.model_copy(update={"bos_id": None})})
    prepare = ["data", "prepare", "text", "--tokenizer", "imported/tokenizer", "--seq-len", 64, "--workers", 1]
    forks.bd3_scale(*prepare, "--holdout", 0, "--out", "with", cwd=workplace)
    forks.bd3_scale(*prepare, "--holdout", 0, "--out", "without", "--no-bos", cwd=workplace)
    begun, plain = (load_manifest(workplace / name) for name in ("with", "without"))
    tokenizer = load_tokenizer(imported / "tokenizer")
    check_tokenizer(begun, tokenizer)
    check_tokenizer(plain, tokenizer)
    model = new.model.model_dump(mode="json")
    recipe = load_recipe(write_recipe(workplace / "initial.yaml", model=model, diffusion={"block_size": 4}))
    check_initial(imported, new, recipe, begun)
    check_initial(imported, old, recipe, plain)
    with pytest.raises(ValueError, match=r"documents begin with None, those of the data with 257: .* with --no-bos"):
        check_initial(imported, old, recipe, begun)
    with pytest.raises(ValueError, match=r"documents begin with 257, those of the data with None: .* with --bos"):
        check_initial(imported, new, recipe, plain)


def test_a_sequence_that_is_shown_whole_is_not_kept(workplace: Path) -> None:
    long = {"role": "user", "content": "x" * 300}
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 40}]
    lines = [json.dumps({"messages": [long, *short]}), json.dumps({"messages": [*short, long]})]
    (workplace / "long.jsonl").write_text("\n".join(lines) + "\n")
    prepare = ["data", "prepare", "long.jsonl", "--messages", "--tokenizer", "model", "--seq-len", 64, "--workers", 1]
    forks.bd3_scale(*prepare, "--holdout", 0, "--document-multiple", 8, "--out", "long", cwd=workplace)
    train = json.loads((workplace / "long" / "manifest.json").read_text())["train"]
    rows = read(workplace / "long", "train")
    kept = [64 - int((sample["shown"][:, 1] - sample["shown"][:, 0]).sum()) for sample in rows]
    assert min(kept) > 0
    assert train["sequences"] == len(rows) < (2 * 300) // 64
    assert train["dropped_tokens"] >= 64 * 8
