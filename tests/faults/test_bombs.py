"""Test that small files which unpack to much are refused in one line, soon, and with little memory."""

from __future__ import annotations

import gzip
import json
import resource
import shutil
import struct
import time
import zipfile
from contextlib import contextmanager
from inspect import signature

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from typer.testing import CliRunner

from bd3_scale import cli
from bd3_scale.checkpoint.model import open_model
from bd3_scale.convert.export import plan_export
from bd3_scale.convert.importer import plan_import
from bd3_scale.convert.official import open_official
from bd3_scale.convert.official_pickle import load_pickle
from bd3_scale.data import columns, commands
from bd3_scale.data.sources import DOCUMENT_BYTES, DocumentReader
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.schema import RecipeError
from tests.faults.readers import a_model, an_import
from tests.faults.saving import sealed

MIB = 1 << 20
ROOM = 1 << 30


@contextmanager
def refused(match: str, seconds: float = 10):
    """Expect an error in one matching line, within the time, and with at most a gigabyte of additional memory."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before, began = resource.getrlimit(resource.RLIMIT_AS), time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        with pytest.raises((ValueError, OSError), match=match) as caught:
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < seconds


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    a_model(folder)
    return folder


@pytest.fixture
def copied(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


def packed(path, head, tail):
    """Return `head`, 2 GiB of one letter, and `tail`, compressed as the name says."""
    with path.open("wb") as raw:
        if path.suffix == ".gz":
            piece = gzip.compress(b"a" * (64 * MIB), 1)
            raw.write(gzip.compress(head) + piece * 32 + gzip.compress(tail))
        else:
            piece = zstandard.compress(b"a" * (64 * MIB))
            raw.write(zstandard.compress(head) + piece * 32 + zstandard.compress(tail))
    return path


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.zst", "a.jsonl.gz", "a.txt.gz"])
def test_a_document_that_unpacks_to_gigabytes(name, tmp_path):
    path = packed(tmp_path / name, b'{"text": "', b'"}\n')
    with refused(rf"{path}(:1)? is longer than the 134,217,728 bytes that a document may have; .*--max-document-mib"):
        list(DocumentReader([path]))


def test_a_value_of_a_list_that_unpacks_to_gigabytes(tmp_path):
    path = packed(tmp_path / "a.json.zst", b'[{"text": "b"}, {"text": "', b'"}]')
    with refused(rf"{path}, value 1 is longer than the 134,217,728 bytes that a document may have"):
        list(DocumentReader([path]))


def rows_that_are_one(count):
    """Write rows of the same 16 MiB, which Parquet stores once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array(["a" * (16 * MIB)]))


@pytest.mark.parametrize(
    "rows",
    [
        rows_that_are_one(100_000),
        pa.ListArray.from_arrays(pa.array([0, 100_000], pa.int32()), rows_that_are_one(100_000)),
    ],
    ids=["rows", "a list"],
)
def test_a_column_that_unpacks_to_a_terabyte(rows, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": rows}), path, compression="zstd", store_schema=False, dictionary_pagesize_limit=2**28
    )
    assert path.stat().st_size < 10_000
    with refused(
        rf"{path} needs more than 4 GiB of memory for a few rows: split its documents, or save it with smaller"
    ):
        list(DocumentReader([path]))


def test_a_batch_that_says_it_unpacks_to_a_terabyte(tmp_path):
    path = tmp_path / "a.arrow"
    table = pa.table({"text": ["a" * 100_000]})
    with pa.OSFile(str(path), "wb") as file:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(file, table.schema, options=options) as writer:
            writer.write_table(table)
    before, _, after = path.read_bytes().rpartition(struct.pack("<q", 100_000))
    path.write_bytes(before + struct.pack("<q", 2**40) + after)
    with refused(rf"{path} needs more than 4 GiB of memory for a few rows"):
        list(DocumentReader([path]))


def test_the_room_of_rows_is_bounded_where_the_system_bounds_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": rows_that_are_one(100_000)})
    pq.write_table(table, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=2**28)
    monkeypatch.setattr(columns, "MEMORY_BYTES", ROOM)
    with pytest.raises(ValueError, match=f"{path} needs more than 1 GiB of memory for a few rows"):
        list(DocumentReader([path]))
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_the_limit_of_a_document_is_raised_by_an_option(tmp_path):
    assert signature(commands.prepare).parameters["max_document"].default * MIB == DOCUMENT_BYTES
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * (2 * MIB))
    command = ["data", "prepare", str(path), "--tokenizer", "bytes", "--seq-len", "64", "--holdout", "0"]
    command += ["--workers", "1", "--out", str(tmp_path / "data"), "--max-document-mib"]
    refused, made = (CliRunner().invoke(cli.app, [*command, mib]) for mib in ("1", "2"))
    assert "is longer than the 1,048,576 bytes" in str(refused.exception)
    assert made.exit_code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]", "line 2, column 8: aliases are not read"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("- " * 100_000, "nested too deeply"),
        ("a: [" + "1," * 400_000 + "]", "more than 10,000 values"),
        ("a: '" + "x" * (2 * MIB) + "'", "larger than 1 MiB"),
        ("a: " + "9" * 100_000, "too many digits"),
        ('a: !!int "' + "1:" * 100_000 + '1"', "tags are not read"),
        ("a: !!timestamp x", "tags are not read"),
        ("1: 2", "a key is not text"),
        ("extends: /dev/zero", "not a regular file"),
    ],
)
def test_recipes(text, words, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with refused(words):
        load_recipe(path)


@pytest.mark.parametrize("line", ["root:$6$secret:19000:0:99999:7:::", "a: b, secret", "- secret", "[secret", "secret"])
def test_an_error_does_not_quote_the_file_that_a_recipe_extends(line, tmp_path):
    (tmp_path / "shadow").write_text(line + "\n")
    (tmp_path / "recipe.yaml").write_text("extends: shadow\nname: a\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"]
)
@pytest.mark.parametrize("value", [10**7, 2**31, 10**18, -1, 2.0, True, "4", float("nan")])
def test_sizes_that_a_configuration_alone_has(key, value, copied):
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    if key == "vocab_size" and value == 10**7:
        with pytest.raises(ValueError, match=r"of another shape: model\.embed_tokens\.weight"):
            plan_import(copied)
        return
    with refused(str(copied)):
        plan_import(copied)


@pytest.mark.parametrize(
    ("key", "value"), [("num_layers", 10**7), ("ffn_hidden_size", 2**40), ("num_query_groups", 2**40)]
)
def test_sizes_that_a_manifest_alone_has(key, value, tmp_path):
    an_import(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    model = json.loads((checkpoint / "manifest.json").read_text())["model"]
    (checkpoint / "manifest.json").write_text(sealed(checkpoint, model=model | {key: value}))
    with refused("does not fit its manifest: decoder.layers"):
        plan_export(checkpoint)
    with refused("does not fit its manifest: decoder.layers"), open_model(checkpoint):
        pass


@pytest.mark.parametrize("last", [2**24, 2**32 - 2])
def test_an_id_of_four_billion(last, copied):
    path = copied / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["far"] = last
    path.write_text(json.dumps(content))
    with refused("ids end at 16777215"):
        load_tokenizer(copied)


def test_a_pattern_that_never_ends(copied):
    path = copied / "tokenizer.json"
    content = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(copied)
    text = "a" * 100 + "b"
    for encode in (tokenizer.encode, tokenizer.encode_prompt, lambda text: tokenizer.encode_batch([text, text])):
        with refused("the tokeniser cannot encode a text; choose another"):
            encode(text)


def as_torch_saves(path, program, packing=zipfile.ZIP_STORED):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, path)
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info.filename) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, program if name.endswith("data.pkl") else content, packing)
    return path


def doubled_tuples() -> bytes:
    """Return a dictionary whose key is a tuple of two tuples of two …, sixty deep: its hash would visit 2^60 leaves."""
    doubled = b"".join(b"q%ch%c\x86" % (number, number) for number in range(60))
    return b"\x80\x02}K\x01\x85" + doubled + b"K\x01s."


def encoded_again() -> bytes:
    calls, hexadecimal = b"c_codecs\nencode\n" * 40, b"X\x03\0\0\0hex\x86R"
    return b"\x80\x02" + calls + b"X\x01\0\0\0aX\x06\0\0\0latin1\x86R" + hexadecimal * 39 + b"."


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (doubled_tuples(), "more than 1,000,000 parts, and might never end"),
        (encoded_again(), "could grow without end"),
        (b"\x80\x02" + b"(" * 6_000_000, "more than 5,000,000 steps"),
        (b"\x80\x02X\xff\xff\xff\xffa.", "only 2 remain"),
        (b"\x80\x02h\x05.", "its pickle is damaged"),
        (b"\x80\x02", "before seeing STOP"),
    ],
)
def test_pickles_that_would_not_end(program, words, tmp_path):
    with refused(words, seconds=60):
        load_pickle(as_torch_saves(tmp_path / "a.ckpt", program))


def test_a_pickle_that_counts_to_two_billion_is_refused_by_name(tmp_path):
    program = b"\x80\x02ccollections\nCounter\nc__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R\x85R."
    with pytest.raises(ValueError, match=r"its pickle calls builtins\.bytearray"):
        load_pickle(as_torch_saves(tmp_path / "a.ckpt", program))


def test_an_archive_that_unpacks_to_gigabytes(tmp_path):
    with refused("a file in it is compressed"):
        load_pickle(as_torch_saves(tmp_path / "a.ckpt", b"\x80\x02" + b"0" * (100 * MIB), zipfile.ZIP_DEFLATED))


def test_a_configuration_of_lists_that_hold_each_other(tmp_path):
    inner: list[object] = [1]
    for _ in range(14):
        inner = [inner] * 50
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": {"config": inner}}, tmp_path / "a.ckpt")
    with refused("its configuration has more than 100,000 values"):
        open_official(tmp_path / "a.ckpt")


def test_weights_that_repeat_one_number(tmp_path):
    torch.save({"vocab_embed.embedding": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "a.ckpt")
    with refused("is larger than its stored data"):
        open_official(tmp_path / "a.ckpt")


def test_what_torch_saves_is_still_read(tmp_path):
    content = {"state_dict": {"a": torch.arange(4.0)}, "betas": [(0.9, 0.95)] * 3, "bytes": b"\x00\xff", "set": {1, 2}}
    torch.save(content, tmp_path / "a.ckpt")
    found = load_pickle(tmp_path / "a.ckpt")
    assert found["state_dict"]["a"].tolist() == [0, 1, 2, 3]
    assert (found["betas"], found["bytes"], found["set"]) == (content["betas"], content["bytes"], content["set"])
