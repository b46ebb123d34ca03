"""Test documents in columns: Parquet, and Arrow as `datasets` saves it, written by pyarrow and datasets themselves."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.data import files as files_module
from bd3_scale.data.chat import ChatTemplate
from bd3_scale.data.prepare import prepare
from bd3_scale.data.sources import DocumentReader, FilePart
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.registry import source_cuts
from tests.data.documents import random_texts
from tests.data.tokenisers import CHAT_TEMPLATE, KINDS, write_tokenizer


def write_arrow(path: Path, table: pa.Table, rows: int = 100, new: Any = pa.ipc.new_stream, **options: Any) -> Path:
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema, **options) as writer:
        writer.write_table(table, rows)
    return path


def write(path: Path, table: pa.Table, rows: int = 100) -> None:
    pq.write_table(table, path, row_group_size=rows) if path.suffix == ".parquet" else write_arrow(path, table, rows)


def texts(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in DocumentReader([path], field)]


def error_of(read: Callable[[Path], object], path: Path) -> str | None:
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return None


TYPES = st.sampled_from([pa.string(), pa.large_string(), pa.string_view()])


@settings(max_examples=15)
@given(
    st.lists(st.text(st.characters(codec="utf-8")), min_size=1),
    TYPES,
    st.sampled_from(["none", "snappy", "gzip", "zstd", "lz4", "brotli"]),
    st.sampled_from([1, 3, 1000]),
    st.booleans(),
    st.sampled_from(["1.0", "2.0"]),
)
def test_a_parquet_column_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[str],
    kind: pa.DataType,
    packing: str,
    rows: int,
    dictionary: bool,
    version: str,
) -> None:
    path = tmp_path_factory.mktemp("parquet") / "t.parquet"
    table = pa.table({"id": range(len(documents)), "text": pa.array(documents, kind)})
    how = {"use_dictionary": dictionary, "data_page_version": version}
    pq.write_table(table, path, compression=packing, row_group_size=rows, **how)
    assert texts(path) == [text for text in documents if text.strip()]


@settings(max_examples=15)
@given(
    st.lists(st.text(st.characters(codec="utf-8")), min_size=1),
    TYPES,
    st.sampled_from([1, 3, 1000]),
    st.sampled_from([pa.ipc.new_stream, pa.ipc.new_file]),
    st.sampled_from([None, "lz4", "zstd"]),
)
def test_an_arrow_column_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[str],
    kind: pa.DataType,
    rows: int,
    new: Any,
    packing: str | None,
) -> None:
    path = tmp_path_factory.mktemp("arrow") / "t.arrow"
    table = pa.table({"id": range(len(documents)), "text": pa.array(documents, kind)})
    write_arrow(path, table, rows, new, options=pa.ipc.IpcWriteOptions(compression=packing))
    assert texts(path) == [text for text in documents if text.strip()]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_parts_are_the_whole_and_tell_what_was_read(tmp_path: Path, suffix: str) -> None:
    documents = random_texts(950, longest=400)
    table, path = pa.table({"text": documents}), tmp_path / f"t{suffix}"
    write(path, table)
    reader = DocumentReader([path])
    whole = list(reader)
    parts = [FilePart(0, size, part) for part, size in source_cuts.get(suffix)(path, 1)]
    assert len(parts) == 10
    assert 0 <= reader.num_bytes - sum(part.num_bytes for part in parts) < 8000  # Parquet's footer is in no part
    found = [list(reader.only([part])) for part in parts]
    assert [d.text for d in itertools.chain(*found)] == [d.text for d in whole] == [t for t in documents if t.strip()]
    positions = [document.position for document in reader.only(parts)]
    assert positions == sorted(positions)
    assert 0 <= sum(part.num_bytes for part in parts) - positions[-1] <= 8  # behind an Arrow stream stands its end
    joined = FilePart(0, 0, (parts[3].part[0], parts[5].part[1]))
    assert [d.text for d in reader.only([joined])] == [d.text for d in itertools.chain(*found[3:6])] != []


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_field_of_a_struct_and_one_whose_name_has_a_dot(tmp_path: Path, suffix: str) -> None:
    rows = [{"body": "one", "id": 1}, {"body": "two", "id": 2}]
    table, path = pa.table({"doc": rows, "doc.id": ["a", "b"], "text": [["x"], ["y"]]}), tmp_path / f"t{suffix}"
    write(path, table)
    assert texts(path, "doc.body") == ["one", "two"]
    assert texts(path, "doc.id") == ["a", "b"]
    beside = r"doc \(struct\), doc\.id \(string\), text \(list\): name the field with --field$"
    for field, message in (
        ("body", rf't{suffix} has no column "body" but {beside}'),
        ("doc.title", rf't{suffix} has no column "doc\.title" but doc\.body \(string\), doc\.id \(int64\): name'),
        ("doc", rf't{suffix}, row 0 has an object in the field "doc", not a string'),
        ("text", rf't{suffix}, row 0 has a list in the field "text", not a string'),
    ):
        with pytest.raises(ValueError, match=message) as error:
            texts(path, field)
        assert "\n" not in str(error.value)


def test_of_parquet_no_other_column_is_read(tmp_path: Path) -> None:
    """Check it with another column that is damaged."""
    path, blobs = tmp_path / "t.parquet", [random.Random(1).randbytes(1000) for _ in range(20)]
    pq.write_table(pa.table({"a": blobs, "text": ["one", "two"] * 10, "z": blobs}), path, compression="gzip")
    data = bytearray(path.read_bytes())
    group = pq.read_metadata(path).row_group(0)
    for column in (group.column(0), group.column(2)):
        start = column.dictionary_page_offset
        data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    assert texts(path) == ["one", "two"] * 10
    with pytest.raises(OSError, match="thrift"):
        pq.read_table(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_of_numbers_and_rows_without_text(tmp_path: Path, suffix: str) -> None:
    table, path = (
        pa.table({"id": [1, 2, 3], "text": ["one", None, "three"], "raw": [b"a"] * 3}),
        tmp_path / f"t{suffix}",
    )
    write(path, table)
    for field, kind in (("id", "int64"), ("raw", "binary")):
        with pytest.raises(
            ValueError, match=rf'has {kind} in the column "{field}", not text; the columns are id \(int'
        ):
            texts(path, field)
    with pytest.raises(ValueError, match=rf't{suffix}, row 1 has null in the field "text", not a string'):
        texts(path)
    reader = DocumentReader([path], on_error="skip")
    assert [document.text for document in reader] == ["one", "three"]
    assert reader.num_skipped == 1
    reader = DocumentReader([path], on_error="skip", max_bytes=4)
    assert [document.text for document in reader] == ["one"]
    assert f"{path}, row 2 is longer than the 4 bytes" in reader.skipped[1]


def test_text_that_is_not_utf8_is_told_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"text": pa.array([b"one", b"caf\xe9", b"two"], pa.binary())})
    pq.write_table(table.cast(pa.schema([("text", pa.string())]), safe=False), path)
    with pytest.raises(ValueError, match=r"t\.parquet, row 1 is not UTF-8 text \(.*0xe9.*\); convert it first"):
        texts(path)
    reader = DocumentReader([path], on_error="skip")
    assert [document.text for document in reader] == ["one", "two"]


def test_a_saved_data_set_is_read_as_datasets_reads_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    datasets = pytest.importorskip("datasets")
    documents = [text or "x" for text in random_texts(120)]
    kept = datasets.Dataset.from_dict({"text": documents, "n": range(120)}).filter(lambda row: row["n"] % 2 == 0)
    other = datasets.Dataset.from_dict({"text": ["held out"], "n": [1]})
    datasets.DatasetDict(train=kept, validation=other).save_to_disk(
        tmp_path / "set", num_shards={"train": 3, "validation": 1}
    )
    folder = tmp_path / "set" / "train"
    loaded = datasets.load_from_disk(str(folder))
    loaded.map(lambda row: {"text": row["text"] * 2}, cache_file_name=str(folder / "cache-1.arrow"))
    with caplog.at_level(logging.WARNING):
        found = texts(folder)
    assert found == [text for text in loaded["text"] if text.strip()] != []
    left_out = "cache-1.arrow, dataset_info.json, state.json"
    assert f"{folder}: 3 files of a saved data set that hold no data left out ({left_out})" in caplog.text
    assert texts(tmp_path / "set") == [*found, "held out"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_conversations_in_a_column_are_those_of_lines(tmp_path: Path, suffix: str) -> None:
    folder = write_tokenizer(tmp_path / "chat", KINDS["chat"], chat_template=CHAT_TEMPLATE)
    turns = [
        [{"role": "user", "content": f"And {n}?"}, {"role": "assistant", "content": "No. " * n}] for n in range(40)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    path = tmp_path / f"t{suffix}"
    write(path, pa.table({"messages": turns, "n": range(40)}))
    made = [
        prepare(
            *([source], tmp_path / f"out{source.suffix}", load_tokenizer(folder), 64),
            **{"holdout": 0.2, "workers": 1, "progress": False, "chat": ChatTemplate(folder)},
        )
        for source in (path, tmp_path / "t.jsonl")
    ]
    assert made[0].train
    assert made[0].train.sequences > 5
    assert (made[0].train, made[0].validation) == (made[1].train, made[1].validation)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_row_is_counted_from_the_beginning_of_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    write(path, pa.table({"text": [*["fine"] * 450, None]}))
    with pytest.raises(ValueError, match=rf"t\{suffix}, row 450 has null"):
        texts(path)
    reader = DocumentReader([path])
    *_, (part, size) = source_cuts.get(suffix)(path, 1)
    place = "row 450" if suffix == ".parquet" else f"after byte {part[0]:,}, row 50"
    with pytest.raises(ValueError, match=rf"t\{suffix}, {place} has null"):
        list(reader.only([FilePart(0, size, part)]))


def test_a_batch_that_ends_behind_its_file_is_no_part(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "t.arrow", pa.table({"text": random_texts(200)}))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(
        ValueError, match=r"t\.arrow is damaged or cut short \(.*a batch ends at byte [\d,]+ of [\d,]+\)"
    ):
        list(source_cuts.get(".arrow")(path, 1))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_damage_is_told_in_one_line(tmp_path: Path, suffix: str) -> None:
    table, path = pa.table({"text": random_texts(200), "n": range(200)}), tmp_path / f"t{suffix}"
    write(path, table, 50)
    sound, rng, num_told = path.read_bytes(), random.Random(1), 0
    for _ in range(60):
        data = bytearray(sound)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data) // 2 if rng.random() < 0.5 else len(data))
            data[-1 - place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        for read in (texts, lambda path: list(source_cuts.get(suffix)(path, 1))):
            error = error_of(read, path)
            assert error is None or (str(path) in error and "\n" not in error)
            num_told += error is not None
    assert num_told > 30


def test_without_pyarrow_it_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    monkeypatch.setattr(
        files_module, "find_spec", lambda name: None if name == "pyarrow" else importlib.util.find_spec(name)
    )
    with pytest.raises(ValueError, match=r"b\.parquet is read with pyarrow, .*: pip install 'bd3_scale\[parquet\]'"):
        DocumentReader([tmp_path])
    assert DocumentReader([tmp_path / "a.txt"]).files


def test_packed_once_more_is_no_format(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.parquet\.gz is not a kind of file that can be read"):
        DocumentReader([tmp_path / "a.parquet.gz"])
