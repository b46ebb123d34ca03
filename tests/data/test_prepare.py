from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from bd3_scale.cli import app
from bd3_scale.data.index import read_index
from bd3_scale.data.manifest import Manifest, Split, load_manifest
from bd3_scale.data.prepare import prepare
from bd3_scale.data.stream import TrainingStream, held_out_batches
from bd3_scale.data.tokenizer import load_tokenizer, train_tokenizer
from bd3_scale.recipe.checks import check_against_data
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.schema import DataRecipe
from tests.data.documents import SEQ_LEN, random_texts, write_jsonl

BYTES = load_tokenizer("bytes")
EOS = 256


def run(sources: list[Path], out: Path, **options: Any) -> Manifest:
    defaults = {"document_multiple": 8, "workers": 1, "progress": False}
    return prepare(sources, out, BYTES, SEQ_LEN, **(defaults | options))


def read(folder: Path, split: str) -> list[dict[str, Any]]:
    """Return the samples as streaming itself reads them."""
    index = json.loads((folder / split / "index.json").read_text())
    from streaming import Stream
    from streaming.base.format import reader_from_json

    import bd3_scale.data.mosaicml  # noqa: F401 - without it streaming imports torchvision

    stream = Stream(local=str(folder), split=split, validate_hash="xxh64", keep_zip=True, download_retry=0)
    shards = [reader_from_json(str(folder), split, info) for info in index["shards"]]
    for shard in shards:
        stream.prepare_shard(shard)
    return [shard[i] for shard in shards for i in range(len(shard))]


def documents_of(samples: list[dict[str, Any]]) -> list[str]:
    counted: list[int] = []
    for sample in samples:
        start = 0
        for length, count in zip(sample["document_lengths"], sample["counted_lengths"], strict=True):
            counted += sample["tokens"][start : start + count].tolist()
            start += length
    texts = BYTES.decode(counted).split("<|endoftext|>")
    assert texts.pop() == ""
    return texts


def test_every_held_out_document_and_nearly_all_of_training_come_back(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    texts = random_texts(150)
    validation, train = read(prepared, "validation"), read(prepared, "train")
    held_out = documents_of(validation)
    assert held_out == [text for text in texts if text in set(held_out)]
    training = [text for text in texts if text not in set(held_out)]
    stored = np.concatenate([sample["tokens"] for sample in train])
    whole = np.concatenate([[*text.encode(), *[EOS] * (8 - len(text.encode()) % 8)] for text in training])
    assert len(whole) - len(stored) == manifest.train.dropped_tokens < SEQ_LEN
    np.testing.assert_array_equal(stored, whole[: len(stored)])
    for split, samples, documents in (("train", train, training), ("validation", validation, held_out)):
        assert samples[0]["tokens"].dtype == np.uint16
        assert getattr(manifest, split) == Split(
            documents=len(documents),
            sequences=len(samples),
            counted_tokens=sum(int(sample["counted_lengths"].sum()) for sample in samples),
            dropped_tokens=manifest.train.dropped_tokens if split == "train" else 0,
            text_bytes=sum(len(text.encode()) for text in documents),
            shards=read_index(prepared / split / "index.json"),
        )
    assert manifest.validation.counted_tokens == manifest.validation.text_bytes + len(held_out)
    assert load_tokenizer(prepared).hash == manifest.tokenizer_hash == BYTES.hash


def test_the_number_of_workers_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks of the usual size would put all of this in one.
    monkeypatch.setattr("bd3_scale.data.encode.CHUNK_CHARACTERS", 500)
    source = write_jsonl(tmp_path / "t.jsonl", ["[MASK]<|endoftext|>", *random_texts(100, seed=3)])
    outs = [tmp_path / "one", tmp_path / "three"]
    for out, workers in zip(outs, (1, 3), strict=True):
        run([source], out, workers=workers)
    one, three = ({p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} for out in outs)
    assert one == three


def test_equal_documents_fall_to_one_side_and_the_seed_decides(tmp_path: Path) -> None:
    texts = random_texts(40, seed=4)
    source = write_jsonl(tmp_path / "t.jsonl", texts * 3)
    held_out = {}
    for seed in (1, 2):
        manifest = run([source], tmp_path / str(seed), holdout=0.3, seed=seed)
        held_out[seed] = documents_of(read(tmp_path / str(seed), "validation"))
        assert manifest.validation.documents == len(held_out[seed]) == 3 * len(set(held_out[seed]))
    assert held_out[1] != held_out[2]


def test_the_share_held_out(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", [f"document {i}" for i in range(4000)])
    manifest = run([source], tmp_path / "out", holdout=0.25)
    assert abs(manifest.validation.documents - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5
    nothing, everything = (run([source], tmp_path / str(share), holdout=share) for share in (0, 1))
    assert nothing.validation is None
    assert everything.train is None
    assert nothing.train.documents == everything.validation.documents == 4000


def test_wide_ids_for_large_vocabularies(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    BYTES.save(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["model"]["vocab"] |= {f"unused{i}": 258 + i for i in range(65_536)}
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    source = write_jsonl(tmp_path / "t.jsonl", random_texts(10))
    prepare(
        [source],
        tmp_path / "out",
        load_tokenizer(folder),
        16,
        document_multiple=8,
        holdout=0,
        workers=1,
        progress=False,
    )
    assert read(tmp_path / "out", "train")[0]["tokens"].dtype == np.uint32


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["long enough to fill a sequence of text"] * 9, {"holdout": 0.5}, "fell to .* with holdout=0.5"),
        (["x"], {"holdout": 0}, "fill 8 tokens, less than one sequence of seq_len=32"),
        ([" ", "\n"], {}, r"t\.jsonl: no document .2 empty"),
        (["x"], {"document_multiple": 5}, "seq_len=32 must be a positive multiple of document_multiple=5"),
        (["x"], {"holdout": 1.5}, "holdout=1.5"),
        (["x"], {"seed": -1}, "seed=-1"),
        (["x"], {"workers": 0}, "workers=0"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path: Path, texts: list[str], options: dict[str, Any], message: str) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    with pytest.raises(ValueError, match=message):
        run([source], tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == [source]


def test_an_error_in_the_middle_of_parallel_work_leaves_nothing(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", random_texts(50))
    source.write_bytes(source.read_bytes() + b"{")
    with pytest.raises(ValueError, match=r"t\.jsonl:51 is not JSON"):
        run([source], tmp_path / "out", workers=2)
    assert list(tmp_path.iterdir()) == [source]


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", random_texts(50))
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        run([source], tmp_path / "out")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["one text"], "the only document never fell to"),
        (["a text"] * 7, "all 7 documents are equal, and none fell to"),
        (["a text", "b text"], "none of the 2 documents fell to"),
        (["", " "], "no document \\(2 empty ones and 0 with errors were left out\\)"),
    ],
)
def test_what_can_be_known_before_tokenising_is_said_before(
    texts: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    monkeypatch.setattr(type(BYTES), "encode_batch", None)
    with pytest.raises(ValueError, match=said):
        prepare([source], tmp_path / "out", BYTES, 32, holdout=0.01, workers=1, progress=False)
    assert not (tmp_path / "out").exists()


def test_documents_that_are_left_out_are_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", ["a" * 90, "", "b" * 90])
    with source.open("a") as file:
        file.write('{"text": null}\n{"content": "x"}\n')
    options = {"holdout": 0, "workers": 1, "progress": False}
    with pytest.raises(ValueError, match=r"t.jsonl:4 has null in the field"):
        prepare([source], tmp_path / "out", BYTES, 32, **options)
    manifest = prepare([source], tmp_path / "out", BYTES, 32, **options, on_error="skip")
    assert (manifest.train.documents, manifest.empty_documents, manifest.skipped_documents) == (2, 1, 2)
    assert "1 documents without a visible character were left out" in caplog.text
    assert "2 that cannot be read were skipped, the first of them:\n  - " in caplog.text
    assert load_manifest(tmp_path / "out") == manifest


@pytest.mark.launch
def test_killed_preparation_leaves_nothing_that_looks_finished_and_no_process(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", [f"{number} " + "word " * 50_000 for number in range(200)])
    code = f"""
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
if __name__ == "__main__":
    prepare([{str(source)!r}], {str(tmp_path / "out")!r}, load_tokenizer("bytes"), 256, workers=2)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        children: list[str] = []
        while len(children) < 3 and time.monotonic() < deadline:  # multiprocessing's tracker and two workers
            time.sleep(0.05)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    assert len(children) == 3
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.05)


def test_trained_tokenizer_end_to_end(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", random_texts(200))
    tokenizer = train_tokenizer([source], tmp_path / "tokenizer", 300, progress=False)
    manifest = prepare(
        [source], tmp_path / "out", tokenizer, 64, document_multiple=16, holdout=1, workers=2, progress=False
    )
    samples = read(tmp_path / "out", "validation")
    counted = np.concatenate([sample["tokens"] for sample in samples]).tolist()
    assert manifest.vocabulary.mask_id not in counted
    text = tokenizer.decode(counted, skip_eos=True)
    assert text == "".join(random_texts(200))


def test_held_out_sources_of_their_own(tmp_path: Path) -> None:
    """Check that all of one source goes to training and all of the other to validation, also equal documents."""
    train, held_out = (random_texts(40, seed=seed) for seed in (1, 2))
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", texts) for name, texts in (("a", train), ("b", held_out))]
    manifest = run(sources[:1], tmp_path / "out", validation=sources[1:])
    assert (manifest.holdout, len(manifest.sources)) == (0, 2)
    assert manifest.train is not None
    assert manifest.train.documents == 40
    assert documents_of(read(tmp_path / "out", "validation")) == held_out
    empty = write_jsonl(tmp_path / "c.jsonl", [])
    with pytest.raises(ValueError, match=r"c\.jsonl: no document"):
        run(sources[:1], tmp_path / "other", validation=[empty])


def test_best_fit_cuts_no_document_that_fits_and_fills_what_is_open(tmp_path: Path) -> None:
    texts = random_texts(80, seed=8, longest=10)
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    manifest = run([source], tmp_path / "out", packing="best-fit", holdout=0.3)
    assert load_manifest(tmp_path / "out").packing == manifest.packing == "best-fit"
    found = {name: read(tmp_path / "out", name) for name in ("train", "validation")}
    assert sorted(chain(*map(documents_of, found.values()))) == sorted(text for text in texts if text.strip())
    assert manifest.train.dropped_tokens == 0
    recipe = DataRecipe(path=str(tmp_path / "out"), seq_len=SEQ_LEN)
    batches = {"validation": held_out_batches(recipe, manifest, batch_size=99, dp_rank=0, dp_size=1)}
    stream = TrainingStream(
        recipe.model_copy(update={"shuffle": False, "num_workers": 0}),
        manifest,
        global_batch_size=manifest.train.sequences,
        dp_rank=0,
        dp_size=1,
        seed=1,
    )
    for name, batch in {"train": next(stream), "validation": next(batches["validation"])}.items():
        filling = np.array(
            [sample["document_lengths"][-1] * (not sample["counted_lengths"][-1]) for sample in found[name]]
        )
        assert filling.any()
        # Of training it is shown, so that nobody learns that a document may be empty; measured it does not count.
        assert batch.shown.sum(1).tolist() == (filling * (name == "train")).tolist()
        assert (batch.padding & ~batch.shown).sum(1).tolist() == [
            int(sample["document_lengths"].sum() - sample["counted_lengths"].sum() - fill * (name == "train"))
            for sample, fill in zip(found[name], filling, strict=True)
        ]
        assert int(batch.counted.sum()) == getattr(manifest, name).counted_tokens


def test_the_packing_is_known_and_concatenation_writes_what_it_did(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", random_texts(60))
    run([source], tmp_path / "out")
    assert "packing" not in json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert load_manifest(tmp_path / "out").packing == "concatenate"
    with pytest.raises(FileExistsError, match="packing is best-fit, there concatenate"):
        run([source], tmp_path / "out", packing="best-fit")


def prepare_for(recipe: Path, *options: object) -> Result:
    command = ["data", "prepare", recipe.parent / "t.jsonl", "--recipe", recipe, "--tokenizer", "bytes", *options]
    return CliRunner().invoke(app, [*map(str, command), "--workers", "1", "--json"])


@pytest.mark.parametrize(
    ("diffusion", "isolate", "multiple"),
    [
        ("{block_size: 4}", True, 4),
        ("{block_size: 4, block_size_schedule: [{block_size: 1, steps: 2}, {block_size: 16, steps: 2}]}", True, 16),
        ("{block_size: 4, block_size_choices: [6, 4]}", True, 12),
        ("{block_size: 48}", True, 48),
        ("{block_size: 16}", False, 1),
    ],
)
def test_the_multiple_is_that_of_a_recipes_block_sizes(
    tmp_path: Path, diffusion: str, isolate: bool, multiple: int
) -> None:
    write_jsonl(tmp_path / "t.jsonl", random_texts(60))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: r\nmodel: {num_layers: 1, hidden_size: 16, num_attention_heads: 2, ffn_hidden_size: 16}\n"
        f"diffusion: {diffusion}\ndata: {{path: d, seq_len: 48, isolate_documents: {str(isolate).lower()}}}\n"
        "train: {steps: 9, global_batch_size: 2, micro_batch_size: 1}\n"
    )
    told = prepare_for(recipe, "--out", tmp_path / "out")
    assert told.exit_code == 0, told.output
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.seq_len, manifest.document_multiple) == (48, multiple)
    check_against_data(load_recipe(recipe), 1, manifest.document_multiple)
    assert "data.seq_len=48, but --seq-len is 96" in str(
        prepare_for(recipe, "--out", tmp_path / "b", "--seq-len", 96).exception
    )
    told = prepare_for(recipe, "--out", tmp_path / "c", "--document-multiple", 3)
    assert ("does not divide document_multiple=3" in str(told.exception)) == isolate
    assert (tmp_path / "c").exists() == (not isolate)


def test_a_length_must_be_said(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "t.jsonl", random_texts(60))
    command = ["data", "prepare", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert "give --seq-len, or --recipe" in str(CliRunner().invoke(app, command).exception)


def test_waste_is_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "t.jsonl", ["a tweet", "another tweet"] * 40)
    command = [
        "data",
        "prepare",
        tmp_path / "t.jsonl",
        "--out",
        tmp_path / "out",
        "--tokenizer",
        "bytes",
        "--seq-len",
        64,
    ]
    told = CliRunner().invoke(app, [*map(str, command), "--workers", "1", "--holdout", "0"])
    assert told.stderr.count("note: padding takes 65.6% of all tokens; it would take 31.2% at") == 1
