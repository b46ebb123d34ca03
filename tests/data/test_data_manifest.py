from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bd3_scale.data.manifest import check_tokenizer, load_manifest
from bd3_scale.data.tokenizer import Tokenizer, load_tokenizer


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
    assert sorted(path.name for path in cache.iterdir()) == ["manifest.json", "tokenizer.json", "tokenizer_config.json"]


def test_a_cache_of_other_data_is_refused_and_kept(tmp_path: Path, prepared: Path) -> None:
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    shutil.copytree(prepared, remote)
    load_manifest(cache, str(remote))
    before = (cache / "manifest.json").read_bytes()
    (remote / "manifest.json").write_bytes(before.replace(b'"seed": 1', b'"seed": 2'))
    with pytest.raises(ValueError, match="caches other data"):
        load_manifest(cache, str(remote))
    assert (cache / "manifest.json").read_bytes() == before
    assert len(list(cache.iterdir())) == 3


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
