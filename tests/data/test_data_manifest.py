from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from bd3_scale.data.manifest import check_tokenizer, data_hash, load_manifest
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_missing_and_invalid(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(FileNotFoundError, match="bd3-scale data prepare"):
        load_manifest(tmp_path)
    content = json.loads((prepared / "manifest.json").read_text())
    for key, value in (("seq_len", "32"), ("format_version", 2), ("unknown", 1), ("sources", [{"path": "x"}])):
        (tmp_path / "manifest.json").write_text(json.dumps(content | {key: value}))
        with pytest.raises(ValueError, match=f"not a valid manifest .*{key}"):
            load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"")
    with pytest.raises(ValueError, match="not a valid manifest"):
        load_manifest(tmp_path)


def test_fetched_from_a_remote_with_the_tokeniser(tmp_path: Path, prepared: Path) -> None:
    cache = tmp_path / "cache"
    assert load_manifest(cache, str(prepared)) == load_manifest(prepared)
    assert load_manifest(cache, str(prepared)) == load_manifest(prepared)
    assert load_tokenizer(cache).hash == load_tokenizer(prepared).hash
    assert files_of(cache) == files_of(prepared) & {
        *("manifest.json", "tokenizer.json", "tokenizer_config.json", "train/index.json", "validation/index.json")
    }


def test_a_cache_of_other_data_is_refused_and_kept(tmp_path: Path, prepared: Path) -> None:
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    shutil.copytree(prepared, remote)
    load_manifest(cache, str(remote))
    manifest, index = (cache / "manifest.json").read_bytes(), (cache / "train" / "index.json").read_bytes()
    # Other contents of equal size, at the same place.
    changed = json.loads(index)
    changed["shards"][1]["raw_data"]["hashes"]["xxh64"] = "0" * 16
    (remote / "train" / "index.json").write_text(json.dumps(changed))
    (remote / "manifest.json").write_bytes(manifest.replace(b'"seed": 1', b'"seed": 2'))
    with pytest.raises(ValueError, match="caches other data"):
        load_manifest(cache, str(remote))
    assert (cache / "manifest.json").read_bytes() == manifest
    assert (cache / "train" / "index.json").read_bytes() == index
    # The same sequences, described otherwise.
    (remote / "train" / "index.json").write_bytes(index)
    assert load_manifest(cache, str(remote)).seed == 2


def test_the_hash_of_the_data_is_that_of_the_sequences(tmp_path: Path, prepared: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    known = data_hash(load_manifest(data))
    assert known == data_hash(load_manifest(prepared))

    def change(name: str, **values: object) -> str:
        content = json.loads((prepared / name).read_text())
        for path, value in values.items():
            *keys, last = path.split("__")
            place = content
            for key in keys:
                place = place[int(key) if key.isdigit() else key]
            place[last] = value
        (data / name).write_text(json.dumps(content, indent=3))
        found = data_hash(load_manifest(data))
        shutil.copy(prepared / name, data / name)
        return found

    # How it was packed, and where the text lay.
    assert (
        change("train/index.json", shards__0__zip_data__bytes=3, shards__0__zip_data__hashes__xxh64="0" * 16) == known
    )
    assert change("manifest.json", sources=[{"path": "/elsewhere", "bytes": 1}], holdout=0.5, seed=9) == known
    for split in ("train", "validation"):
        assert change(f"{split}/index.json", shards__0__raw_data__hashes__xxh64="0" * 16) != known
        assert change(f"{split}/index.json", shards__0__samples=2) != known
    assert change("manifest.json", tokenizer_hash="0" * 64) != known


def test_an_index_without_hashes_or_of_another_kind_of_file_is_refused(tmp_path: Path, prepared: Path) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    index = tmp_path / "data" / "train" / "index.json"
    content = json.loads(index.read_text())
    content["shards"][0]["raw_data"]["hashes"] = {}
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"train/index\.json is damaged \(shards\.0\.raw_data\.hashes\.xxh64"):
        load_manifest(tmp_path / "data")
    index.unlink()
    os.mkfifo(index)
    with pytest.raises(FileNotFoundError, match=r"train/index\.json is missing"):
        load_manifest(tmp_path / "data")


def test_missing_remote(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/manifest\.json"):
        load_manifest(tmp_path / "cache", str(tmp_path / "nowhere"))


def test_another_tokeniser_is_refused(tmp_path: Path, prepared: Path) -> None:
    manifest = load_manifest(prepared)
    check_tokenizer(manifest, load_tokenizer(prepared))
    load_tokenizer("bytes").save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    other: Tokenizer = load_tokenizer(tmp_path)
    assert other.vocabulary == manifest.vocabulary
    with pytest.raises(ValueError, match="not the one that the data was prepared with"):
        check_tokenizer(manifest, other)
