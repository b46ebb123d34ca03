"""Test `data import` with tokenised corpora as Megatron and MosaicML's writer make them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from typer.testing import CliRunner

from bd3_scale import cli
from bd3_scale.data import tasks
from bd3_scale.data.imported import Kind
from bd3_scale.data.manifest import Manifest, load_manifest
from bd3_scale.data.mosaicml import MDSWriter
from bd3_scale.data.prepare import prepare
from bd3_scale.data.shards import open_shards
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3_scale.recipe.schema import DataRecipe
from tests.data.documents import random_texts, write_jsonl
from tests.data.tokenisers import KINDS, write_tokenizer

L = 32
TEXTS = [text for text in random_texts(400) if text.strip()]
OPTIONS = {"document_multiple": 8, "holdout": 0.2, "workers": 1, "progress": False}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Make a byte-level BPE tokeniser whose template begins texts with a BOS token."""
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokeniser") / "begins", KINDS["begins"]))


def ids_of(tokenizer: Tokenizer, *, bos: bool = False, eos: bool = True) -> list[list[int]]:
    begin, end = [tokenizer.vocabulary.bos_id] * bos, [tokenizer.vocabulary.eos_id] * eos
    return [[*begin, *tokenizer.encode(text), *end] for text in TEXTS]


def write_megatron(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any = np.int32, sentences: int = 1) -> Path:
    """Write a corpus as Megatron's `tools/preprocess_data.py` does, also with documents of several sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        parts = [part.tolist() for part in np.array_split(ids, sentences)]
        builder.add_document(torch.tensor([*ids]), [len(part) for part in parts])
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_mds(out: Path, samples: Sequence[Sequence[int]], kind: str, **options: Any) -> Path:
    """Write MDS as Foundry's `convert_dataset_hf.py` does; `bytes` hold int64."""
    dtype = {"bytes": "int64"}.get(kind) or (kind.split(":")[1] if ":" in kind else "int32")
    with MDSWriter(out=str(out), columns={"tokens": kind}, **options) as writer:
        for ids in samples:
            array = np.asarray(ids, dtype)
            writer.write({"tokens": array.tobytes() if kind == "bytes" else array})
    return out


def concatenated(documents: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Cut ids as Foundry's `ConcatTokensDataset`; it drops the rest, which is a shorter sample here."""
    stream = [token for ids in documents for token in ids]
    return [stream[start : start + length] for start in range(0, len(stream), length)]


@pytest.fixture(scope="module")
def of_text(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Manifest:
    """Return what `data prepare` makes of the same text with the same tokeniser."""
    folder = tmp_path_factory.mktemp("of-text")
    return prepare([write_jsonl(folder / "t.jsonl", TEXTS)], folder / "out", tokenizer, L, **OPTIONS)


def same(made: Manifest, of_text: Manifest) -> bool:
    """Compare two folders bit for bit: the shards' hashes are compared, too."""
    return (made.train, made.validation) == (of_text.train, of_text.validation)


def imported(source: Path, kind: Kind, tokenizer: Tokenizer, **options: Any) -> Manifest:
    return prepare([source], source.parent / "out", tokenizer, L, tokens=kind, **(OPTIONS | options))


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
@pytest.mark.parametrize(("bos", "eos", "sentences"), [(False, True, 1), (True, True, 2), (False, False, 3)])
def test_megatron_becomes_what_its_text_does(
    tmp_path: Path, tokenizer: Tokenizer, of_text: Manifest, dtype: Any, bos: bool, eos: bool, sentences: int
) -> None:
    prefix = write_megatron(tmp_path / "corpus_text_document", ids_of(tokenizer, bos=bos, eos=eos), dtype, sentences)
    made = imported(prefix, "megatron", tokenizer)
    assert same(made, of_text)
    assert made.tokens == "megatron"


@pytest.mark.parametrize("kind", ["bytes", "ndarray", "ndarray:int32", "ndarray:uint16", "ndarray:int64"])
@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_samples_of_mds_that_follow_each_other_become_what_their_text_does(
    tmp_path: Path, tokenizer: Tokenizer, of_text: Manifest, kind: str, compression: str | None
) -> None:
    samples = concatenated(ids_of(tokenizer), 40)
    folder = write_mds(tmp_path / "mds", samples, kind, compression=compression, hashes=["sha1"])
    assert same(imported(folder, "mds", tokenizer), of_text)


def test_samples_of_a_fixed_shape_and_documents_that_only_begin(tmp_path: Path, tokenizer: Tokenizer) -> None:
    *samples, _ = concatenated(ids_of(tokenizer, bos=True, eos=False), 40)
    made = imported(write_mds(tmp_path / "mds", samples, "ndarray:int32:40"), "mds", tokenizer)
    begun = sum(ids.count(tokenizer.vocabulary.bos_id) for ids in samples)
    assert sum(split.documents for split in made.splits.values()) == begun > len(TEXTS) - 20


def test_samples_of_mds_that_are_documents(tmp_path: Path, tokenizer: Tokenizer, of_text: Manifest) -> None:
    folder = write_mds(tmp_path / "mds", ids_of(tokenizer, eos=False), "ndarray:int32", size_limit=4000)
    assert len(list(folder.glob("*.mds"))) > 5
    with pytest.raises(ValueError, match=r"shard\.00000\.mds has no end of document \(the id \d+\) in .*mds-documents"):
        imported(folder, "mds", tokenizer)
    assert same(imported(folder, "mds-documents", tokenizer), of_text)


def test_tasks_and_workers_change_nothing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that each part of a Megatron file has the documents that begin in it, wherever the cut is."""
    prefix = write_megatron(tmp_path / "corpus", ids_of(tokenizer))
    monkeypatch.setattr(tasks, "TASK_BYTES", 5001)
    made = []
    for workers in (1, 2):
        made.append(imported(prefix, "megatron", tokenizer, workers=workers))
        shutil.rmtree(tmp_path / "out")
    assert same(*made)
    counts = [split.documents for split in made[0].splits.values()]
    assert sum(counts) == len(TEXTS)


def test_what_stands_in_the_shards_is_text_without_the_source_s_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Check that two ends in a row, as padding has them, make no document."""
    eos, bos = tokenizer.vocabulary.eos_id, tokenizer.vocabulary.bos_id
    document = tokenizer.encode("The barge left the lock at six and the keeper wrote its name down.")
    source = write_megatron(tmp_path / "c", [[*document, eos, eos, bos, *document, eos], [eos], document])
    made = imported(source, "megatron", tokenizer, holdout=0.0, document_multiple=1)
    assert made.train
    assert (made.train.documents, made.empty_documents) == (3, 0)
    shards = open_shards(DataRecipe(path=str(tmp_path / "out"), seq_len=L), load_manifest(tmp_path / "out"), "train")
    tokens = np.concatenate([shards[index]["tokens"] for index in range(len(shards))])
    assert tokens.tolist() == ([bos, *document, eos] * 3)[: len(tokens)]


@pytest.mark.parametrize("kind", ["mds", "megatron"])
def test_ids_that_mean_nothing_are_refused(tmp_path: Path, tokenizer: Tokenizer, kind: Kind) -> None:
    size, eos, mask = tokenizer.vocabulary.size, tokenizer.vocabulary.eos_id, tokenizer.vocabulary.mask_id
    for number, (wrong, words) in enumerate(((size, "no token of"), (mask, "the mask's"), (-1, "no token of"))):
        documents, source = [[5, 6, eos], [7, wrong, eos]], tmp_path / str(number)
        write_mds(source, documents, "ndarray:int32") if kind == "mds" else write_megatron(source, documents)
        with pytest.raises(ValueError, match=rf", (sample|document) 1 has the id {wrong}, which .*{words}") as error:
            imported(source, kind, tokenizer)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


def spoilt(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("suffix", "change", "words"),
    [
        (".idx", lambda data: data.__setitem__(0, 0), "is not an index of Megatron"),
        (".idx", lambda data: data.__delitem__(slice(20, None)), "is not an index of Megatron"),
        (".idx", lambda data: data.__setitem__(9, 2), "version 2"),
        (".idx", lambda data: data.__setitem__(17, 6), "ids of kind 6"),
        (".idx", lambda data: struct.pack_into("<Q", data, 18, 2**60), "is damaged: .* bytes, where"),
        (".idx", lambda data: data.__delitem__(slice(-3, None)), "is damaged: .* bytes, where"),
        (".idx", lambda data: struct.pack_into("<i", data, 34 + 4, -5), "document 1 does not follow"),
        (".idx", lambda data: struct.pack_into("<i", data, 34 + 4, 2**31 - 1), "document 1 has 2,147,483,647 tokens"),
        (".idx", lambda data: struct.pack_into("<q", data, 34 + 4 * 400 + 8, 2**62), "document 1 does not follow"),
        (
            ".idx",
            lambda data: struct.pack_into("<q", data, 34 + 12 * 400 + 8, 2**40),
            "document 1 begins with sequence 1099511627776",
        ),
        (".bin", lambda data: data.__delitem__(slice(-5, None)), "is cut short"),
    ],
)
def test_damage_of_megatron_s_files_is_told(
    tmp_path: Path, tokenizer: Tokenizer, suffix: str, change: Callable[[bytearray], object], words: str
) -> None:
    documents = (ids_of(tokenizer) * 2)[:400]
    prefix = write_megatron(tmp_path / "corpus", documents)
    spoilt(prefix.with_suffix(suffix), change)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{words}") as error:
        imported(prefix, "megatron", tokenizer)
    assert "\n" not in str(error.value)


def test_damage_of_mds_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = ids_of(tokenizer)
    folder = write_mds(tmp_path / "mds", documents, "ndarray:int32")
    sound = folder / "shard.00000.mds"
    for change in (
        lambda data: struct.pack_into("<I", data, 0, 7),
        lambda data: struct.pack_into("<I", data, 8, 2**32 - 1),
        lambda data: data.__delitem__(slice(5000, None)),
        lambda data: data.__delitem__(slice(0, None)),
    ):
        kept = sound.read_bytes()
        spoilt(sound, change)
        with pytest.raises(ValueError, match=rf"{sound} is damaged") as error:
            imported(folder, "mds", tokenizer)
        assert "\n" not in str(error.value)
        sound.write_bytes(kept)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"column_encodings": ["pkl"]}, r"no column `tokens` of bytes or ndarray, but tokens \(pkl\)"),
        ({"column_names": ["text"], "column_encodings": ["str"]}, r"but text \(str\): text belongs to `data prepare`"),
        ({"raw_data": {"basename": "../shard.00000.mds", "bytes": 1}}, "basename"),
        ({"compression": "br"}, "packed with br; only zstd can be read"),
        ({"format": "json"}, "format"),
    ],
)
def test_an_index_of_a_stranger(tmp_path: Path, tokenizer: Tokenizer, change: dict[str, Any], words: str) -> None:
    folder = write_mds(tmp_path / "mds", ids_of(tokenizer), "ndarray:int32")
    content = json.loads((folder / "index.json").read_text())
    content["shards"][0] |= change
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as error:
        imported(folder, "mds", tokenizer)
    assert str(folder / "index.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_sources_that_are_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_mds(tmp_path / "foundry" / "train", [[1, 2]], "bytes")
    with pytest.raises(FileNotFoundError, match=r"foundry has no index\.json, but train in it: name one of these"):
        imported(tmp_path / "foundry", "mds", tokenizer)
    with pytest.raises(FileNotFoundError, match=r"corpus\.bin does not exist: a corpus of Megatron is"):
        imported(tmp_path / "corpus", "megatron", tokenizer)
    with pytest.raises(ValueError, match="s3://bucket/corpus is remote"):
        prepare(["s3://bucket/corpus"], tmp_path / "out", tokenizer, L, tokens="mds")


def test_the_command(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    ids = [[*tokenizer.encode(text), tokenizer.vocabulary.eos_id] for text in TEXTS]
    for name, documents in (("train", ids[:300]), ("held", ids[300:])):
        write_megatron(tmp_path / name, documents, np.uint16)
    command = ["data", "import", f"{tmp_path}/train.bin", "--format", "megatron", "--tokenizer", "bytes", "--json"]
    command += ["--out", f"{tmp_path}/out", "--seq-len", "64", "--workers", "1", "--validation", f"{tmp_path}/held.idx"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    manifest = json.loads(done.stdout)
    assert [manifest[split]["documents"] for split in ("train", "validation")] == [300, len(TEXTS) - 300]
    assert [Path(source["path"]).name for source in manifest["sources"]] == ["train.bin", "held.bin"]
