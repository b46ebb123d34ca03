"""Test `data inspect|stats|sample|verify` against the documents of which the data were made."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from typer.testing import CliRunner

from bd3_scale.cli import app
from bd3_scale.data import split_writer
from bd3_scale.data.describe import description, sampled
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.mosaicml import CloudDownloader
from bd3_scale.data.packing import Packing
from bd3_scale.data.prepare import prepare
from bd3_scale.data.statistics import statistics
from bd3_scale.data.stored import StoredData, stored_data
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.data.verify import problems
from bd3_scale.data.waste import waste_note
from tests.data.documents import random_texts, write_jsonl

BYTES = load_tokenizer("bytes")
EOS, MASK = 256, 257
L, MULTIPLE = 64, 8


def prepared_as(folder: Path, texts: list[str], packing: Packing = "concatenate", **options: Any) -> StoredData:
    source = write_jsonl(folder / "text.jsonl", texts)
    how = {"document_multiple": MULTIPLE, "holdout": 0.0, "workers": 1, "progress": False} | options
    prepare([source], folder / packing, BYTES, L, packing=packing, **how)
    return StoredData(str(folder / packing))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_writer, "SHARD_BYTES", 2048)


def expected_of_concatenation(texts: list[str]) -> dict[str, Any]:
    """Return the expected statistics, computed from the lengths of the concatenated documents."""
    lengths = np.array([len(text.encode()) + 1 for text in texts])
    padded = -(-lengths // MULTIPLE) * MULTIPLE
    ends = np.cumsum(padded)
    starts = ends - padded
    stored = int(ends[-1]) // L * L
    whole = ends <= stored
    cut = whole & (starts // L != (ends - 1) // L)
    begun = starts < stored
    return {
        "sequences": stored // L,
        "document_ends": int((starts + lengths <= stored).sum()),
        "cuts": int(((np.minimum(ends, stored) - 1) // L - starts // L)[begun].sum() + (begun & ~whole).sum()),
        "fitting_documents": int((whole & (padded <= L)).sum()),
        "fitting_documents_cut": int((cut & (padded <= L)).sum()),
        "padding_tokens": int((np.minimum(ends, stored) - np.minimum(starts + lengths, stored)).sum()),
        "lengths": np.minimum(starts + lengths, stored)[begun] - starts[begun],
    }


def test_statistics_of_concatenated_documents(tmp_path: Path, small_shards: None) -> None:
    texts = [text for text in random_texts(150, seed=5, longest=200) if text.strip()]
    data = prepared_as(tmp_path, texts)
    assert len(data.shards("train")) > 5
    found = statistics(data, "train")
    summary, expected = found.summary(), expected_of_concatenation(texts)
    lengths = expected.pop("lengths")
    assert {key: summary[key] for key in expected} == expected
    assert expected["fitting_documents_cut"] > 10
    assert summary["filling_tokens"] == 0
    assert sorted(found.document_lengths.elements()) == sorted(lengths.tolist())
    quantiles = np.quantile(lengths, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1], method="inverted_cdf")
    assert list(summary["document_tokens"].values()) == [pytest.approx(lengths.mean()), *quantiles.tolist()]
    assert summary["counted_tokens"] == load_manifest(data.place).train.counted_tokens


def test_statistics_of_best_fit(tmp_path: Path, small_shards: None) -> None:
    texts = [text for text in random_texts(150, seed=5, longest=200) if text.strip()]
    data = prepared_as(tmp_path, texts, "best-fit")
    summary = statistics(data, "train").summary()
    lengths = np.array([len(text.encode()) + 1 for text in texts])
    padded = -(-lengths // MULTIPLE) * MULTIPLE
    text = int(lengths.sum())
    assert summary["text_tokens"] == text
    assert summary["document_ends"] == len(texts)
    assert summary["cuts"] == int(((padded - 1) // L).sum())
    assert summary["fitting_documents_cut"] == 0
    filling = summary["tokens"] - int(padded.sum())
    assert summary["filling_tokens"] == filling
    assert 0 < filling < 0.03 * summary["tokens"]
    assert summary["padding_tokens"] == padded.sum() - text
    # What fills a sequence is not trained on, else it would teach that a document may be empty.
    assert summary["shown_tokens"] == filling
    assert summary["counted_tokens"] == text


def test_documents_a_sequence(tmp_path: Path) -> None:
    data = prepared_as(tmp_path, ["a" * 31, "b" * 15, "c" * 15, "d" * 63, "e" * 7], holdout=1.0)
    found = statistics(data, "validation")
    assert found.documents_a_sequence == {3: 1, 1: 2}
    assert found.filling_tokens == 56


@pytest.mark.parametrize("packing", ["concatenate", "best-fit"])
def test_the_note_foretells_what_other_multiples_waste(tmp_path: Path, packing: Packing) -> None:
    texts = random_texts(120, seed=6, longest=20)
    shares = {}
    for multiple in (32, 16, 8, 4, 2):
        (tmp_path / str(multiple)).mkdir()
        data = prepared_as(tmp_path / str(multiple), texts, packing, document_multiple=multiple, holdout=1.0)
        found = statistics(data, "validation")
        wasted = found.padding_tokens + (found.filling_tokens if packing == "best-fit" else 0)
        shares[multiple] = wasted / (wasted + found.text_tokens)
    note = waste_note(StoredData(str(tmp_path / "32" / packing)))
    assert f"padding takes {shares[32]:.1%} of all tokens" in note
    told = {multiple: f"{shares[multiple]:.1%} at --document-multiple {multiple}" for multiple in (16, 8, 4, 2)}
    least = max(multiple for multiple, share in shares.items() if share <= 0.05)
    assert [multiple for multiple, words in told.items() if words in note] == [m for m in told if m >= least]
    assert (waste_note(StoredData(str(tmp_path / str(least) / packing))) is None) == (shares[least] <= 0.05)


def test_best_fit_that_leaves_much_open_is_told(tmp_path: Path) -> None:
    data = prepared_as(tmp_path, [letter * 35 for letter in "abcdefgh"], "best-fit", document_multiple=4)
    assert "padding takes 43.8% of all tokens; it would take 0.0% with --packing concatenate" in waste_note(data)


def test_samples_are_the_documents(tmp_path: Path, small_shards: None) -> None:
    # Letters of one byte: no cut is inside one.
    texts = ["".join(letter for letter in text if letter.isascii()) for text in random_texts(60, seed=7)]
    texts = [text for text in texts if text.strip()]
    data = prepared_as(tmp_path, texts, holdout=1.0)
    total = load_manifest(data.place).validation.sequences
    assert total > 20
    whole = list(sampled(data, "validation", total, seed=1))
    assert [one["id"] for one in whole] == list(range(total))
    pieces = [piece for one in whole for piece in one["documents"]]
    assert all(piece["tokens"] % MULTIPLE == 0 for piece in pieces)
    assert sum(piece["tokens"] for piece in pieces) == total * L
    text = "".join(run["text"] for piece in pieces for run in piece["runs"])
    assert text.split("<|endoftext|>") == [*texts, ""]
    assert [piece["cut"] for piece in pieces if piece["tokens"] > piece["padding"]].count(False) == len(texts)
    few = list(sampled(data, "validation", 3, seed=2))
    assert few == list(sampled(data, "validation", 3, seed=2)) != list(sampled(data, "validation", 3, seed=3))
    assert all(one == whole[one["id"]] for one in few)
    assert list(sampled(data, "validation", 1, 1, ids=[7, 0])) == [whole[0], whole[7]]
    with pytest.raises(ValueError, match=f"no sequence {total} in validation: the last is {total - 1}"):
        list(sampled(data, "validation", 1, 1, ids=[total]))
    with pytest.raises(ValueError, match="no train split"):
        list(sampled(data, "train", 1, 1))


def test_what_is_shown_and_what_controls_a_terminal(tmp_path: Path) -> None:
    tokenizer = BYTES.with_bos(EOS)
    source = write_jsonl(tmp_path / "text.jsonl", ["a\x1b[31mb\u202ec"])
    prepare([source], tmp_path / "data", tokenizer, L, document_multiple=8, holdout=1.0, workers=1, progress=False)
    (one,) = sampled(StoredData(str(tmp_path / "data")), "validation", 1, seed=1)
    first, filling = one["documents"]
    assert first["runs"] == [
        {"text": "<|endoftext|>", "shown": True},
        {"text": "a\x1b[31mb\u202ec<|endoftext|>", "shown": False},
    ]
    assert list(problems(StoredData(str(tmp_path / "data")))) == []
    assert filling == {"tokens": L - 16, "padding": L - 16, "cut": False, "runs": []}
    told = CliRunner().invoke(app, ["data", "sample", str(tmp_path / "data")])
    assert r"a\x1b[31mb\u202ec<|endoftext|>" in told.output
    assert "\x1b" not in told.output
    assert "validation 0: 1 document\n── document 1: 13 tokens, 3 of padding\n" in told.output
    assert told.output.endswith("── filling: 48 tokens\n")


def test_a_description(tmp_path: Path, prepared: Path) -> None:
    found = description(StoredData(str(prepared)))
    manifest = load_manifest(prepared)
    assert found["special_tokens"] == {"eos": "<|endoftext|>", "mask": "[MASK]"}
    assert found["packing"] == "concatenate"
    for name, split in manifest.splits.items():
        files = list((prepared / name).glob("*.zstd"))
        assert found["splits"][name]["shards"] == len(files)
        assert found["splits"][name]["bytes"] == sum(file.stat().st_size for file in files)
        assert found["splits"][name]["documents"] == split.documents


def test_data_may_be_a_recipe_or_lie_in_an_object_store(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(_: CloudDownloader, address: str, place: str) -> None:
        shutil.copy(address.replace("s3://bucket", str(prepared.parent)), place)

    monkeypatch.setattr(CloudDownloader, "download", download)
    recipe = tmp_path / "recipe.yaml"
    model = "{num_layers: 1, hidden_size: 16, num_attention_heads: 2, ffn_hidden_size: 16}"
    recipe.write_text(
        f"name: r\nmodel: {model}\ndiffusion: {{block_size: 8}}\n"
        f"data: {{path: cache, remote: 's3://bucket/{prepared.name}', seq_len: 32}}\n"
        "train: {steps: 1, global_batch_size: 2, micro_batch_size: 1}\n"
    )
    here = StoredData(str(prepared))
    (there,) = stored_data([str(recipe)])
    assert there.place == f"s3://bucket/{prepared.name}"
    assert description(there) == description(here) | {"data": there.place}
    assert statistics(there, "train").summary() == statistics(here, "train").summary()
    assert list(problems(there)) == []
    assert waste_note(there) == waste_note(here)
    sources = "sources: [{name: a, path: here, weight: 1}, {name: b, path: c, remote: 's3://b', weight: 1}]"
    recipe.write_text(recipe.read_text().replace(f"path: cache, remote: 's3://bucket/{prepared.name}'", sources))
    assert [source.place for source in stored_data([str(recipe)])] == ["here", "s3://b"]


# ---- verify


def edit_shard(folder: Path, change: Callable[[list[dict[str, Any]]], None], split: str = "train") -> None:
    """Write the first shard anew, with an index that agrees: what only a look into the sequences finds."""
    from streaming.base.format import reader_from_json
    from streaming.base.format.mds.encodings import mds_encode

    place = folder / split / "index.json"
    index = json.loads(place.read_text())
    info = index["shards"][0]
    packed = folder / split / info["zip_data"]["basename"]
    content = zstandard.decompress(packed.read_bytes())
    ends = np.frombuffer(content, "<u4", info["samples"] + 2)[1:]
    head = content[4 + 4 * len(ends) : ends[0]]
    decode = reader_from_json("", "", info).decode_sample
    samples = [
        {name: value.copy() for name, value in decode(content[a:b]).items()} for a, b in itertools.pairwise(ends)
    ]
    change(samples)
    body = []
    for sample in samples:
        columns = list(zip(info["column_names"], info["column_encodings"], info["column_sizes"], strict=True))
        data = [mds_encode(encoding, sample[name]) for name, encoding, _ in columns]
        sizes = [len(d) for d, (_, _, size) in zip(data, columns, strict=True) if not size]
        body.append(np.array(sizes, "<u4").tobytes() + b"".join(data))
    begin = 4 + 4 * len(ends) + len(head)
    offsets = np.cumsum([begin, *map(len, body)]).astype("<u4")
    content = np.uint32(len(samples)).tobytes() + offsets.tobytes() + head + b"".join(body)
    zipped = zstandard.compress(content)
    packed.write_bytes(zipped)
    for key, data in (("raw_data", content), ("zip_data", zipped)):
        info[key] |= {"bytes": len(data), "hashes": {"xxh64": xxhash.xxh64_hexdigest(data)}}
    place.write_text(json.dumps(index))


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def another_tokenizer(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", lambda content: content["model"]["vocab"].update({"a": 98, "b": 97}))


def swap_hashes(folder: Path) -> None:
    file = folder / "train-documents.u64"
    np.fromfile(file, "<u8")[::-1].tofile(file)


def put(name: str, row: int, value: int, place: int = 0) -> Callable[[list[dict[str, Any]]], None]:
    def change(samples: list[dict[str, Any]]) -> None:
        samples[row][name][place] = value

    return change


def pad_with_text(samples: list[dict[str, Any]]) -> None:
    sample = next(s for s in samples if s["counted_lengths"][0] < s["document_lengths"][0])
    sample["tokens"][sample["counted_lengths"][0]] = 5


def move_a_bound(samples: list[dict[str, Any]]) -> None:
    several = (s for s in samples if len(s["document_lengths"]) > 1)
    sample = next(s for s in several if s["counted_lengths"][0] < s["document_lengths"][0])
    sample["document_lengths"][:2] += np.array([-1, 1], np.int32)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (lambda f: flip_a_byte(f / "train/shard.00001.mds.zstd"), r"shard\.00001.* its hash is"),
    "short shard": (
        lambda f: (f / "train/shard.00001.mds.zstd").write_bytes(b"abc"),
        r"shard\.00001\.mds\.zstd is damaged: it has 3 bytes",
    ),
    "no shard": (lambda f: (f / "train/shard.00002.mds.zstd").unlink(), r"shard\.00002\.mds\.zstd is missing"),
    "no index": (lambda f: (f / "validation/index.json").unlink(), r"validation/index\.json is missing"),
    "damaged index": (lambda f: flip_a_byte(f / "validation/index.json"), r"validation/index\.json is damaged"),
    "strange shard": (
        lambda f: shutil.copy(f / "train/shard.00001.mds.zstd", f / "train/shard.00999.mds.zstd"),
        r"shard\.00999\.mds\.zstd: no index names it",
    ),
    "another shard's file": (
        lambda f: shutil.copy(f / "train/shard.00001.mds.zstd", f / "train/shard.00000.mds.zstd"),
        r"shard\.00000\.mds\.zstd is damaged",
    ),
    "shard left out": (
        lambda f: edit_json(f / "train/index.json", lambda index: index["shards"].pop()),
        r"train: \d+ sequences, and the manifest says \d+",
    ),
    "mask": (lambda f: edit_shard(f, put("tokens", 3, MASK)), r"shard\.00000.*: sequence 3 has the id of the mask"),
    "strange id": (lambda f: edit_shard(f, put("tokens", 2, 999)), "sequence 2 has an id outside the vocabulary"),
    "sum of lengths": (
        lambda f: edit_shard(f, put("document_lengths", 4, 40)),
        "sequence 4 has document_lengths that do not add up to 32",
    ),
    "no multiple": (lambda f: edit_shard(f, move_a_bound), "a document whose length is no multiple of 8"),
    "counted": (
        lambda f: edit_shard(f, put("counted_lengths", 1, 33)),
        "sequence 1 has more counted tokens than its document has",
    ),
    "fewer counted": (lambda f: edit_shard(f, put("counted_lengths", 1, 1)), "the manifest says"),
    "padding": (lambda f: edit_shard(f, pad_with_text), "has padding that is not the end of document"),
    "count": (
        lambda f: edit_json(f / "manifest.json", lambda m: m["validation"].update(counted_tokens=7)),
        r"validation: [\d,]+ tokens that count, and the manifest says 7",
    ),
    "documents": (
        lambda f: edit_json(f / "manifest.json", lambda m: m["validation"].update(documents=70_000)),
        r"validation: [\d,]+ ends of documents, and the manifest says 70,000",
    ),
    "tokeniser": (
        another_tokenizer,
        r"data: the tokeniser \(hash \w+\) is not the one that the data was prepared with",
    ),
    "another mask": (
        lambda f: edit_json(f / "manifest.json", lambda m: m["vocabulary"].update(mask_id=255)),
        "mask_id of the vocabulary is 257, and the manifest says 255",
    ),
    "no tokeniser": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    "hashes": (swap_hashes, r"train-documents\.u64: its hashes are not sorted"),
    "cut hashes": (
        lambda f: (f / "train-documents.u64").write_bytes((f / "train-documents.u64").read_bytes()[:-3]),
        "no multiple of 8 bytes",
    ),
}


@pytest.mark.parametrize("packing", ["concatenate", "best-fit"])
def test_sound_data_have_no_problems(tmp_path: Path, packing: Packing, small_shards: None, prepared: Path) -> None:
    assert list(problems(StoredData(str(prepared)))) == []
    assert list(problems(prepared_as(tmp_path, random_texts(100), packing, holdout=0.3))) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_told_in_a_line(tmp_path: Path, prepared: Path, damage: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data, ignore=shutil.ignore_patterns("*.mds"))
    do, words = DAMAGES[damage]
    do(data)
    found = list(problems(StoredData(str(data))))
    assert any(re.search(words, line) for line in found), found
    assert all("\n" not in line for line in found)
    assert len(found) <= 3


def test_the_command_ends_with_1_where_something_is_wrong(tmp_path: Path, prepared: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    flip_a_byte(data / "train/shard.00001.mds.zstd")
    told = CliRunner().invoke(app, ["data", "verify", str(prepared), str(data)])
    assert told.exit_code == 1
    assert f"{prepared}: sound" in told.output
    assert told.output.count("shard.00001.mds.zstd is damaged") == 1
    told = CliRunner().invoke(app, ["data", "verify", str(prepared), str(data), "--json"])
    assert told.exit_code == 1
    assert [len(lines) for lines in json.loads(told.output).values()] == [0, 1]
    assert CliRunner().invoke(app, ["data", "verify", str(prepared)]).exit_code == 0


def test_tables_and_json(prepared: Path) -> None:
    for command in ("inspect", "stats", "sample"):
        told = CliRunner().invoke(app, ["data", command, str(prepared), str(prepared)], env={"COLUMNS": "200"})
        assert told.exit_code == 0, told.output
        assert told.output.count(str(prepared)) >= 2
        parsed = json.loads(CliRunner().invoke(app, ["data", command, str(prepared), "--json"]).output)
        assert parsed[0]["data"] == str(prepared)
