from __future__ import annotations

import itertools
import json
import os
import shutil
import traceback
from pathlib import Path
from typing import Any

import pytest
import xxhash
import zstandard

from bd3_scale.data import remote
from bd3_scale.data.batch import Batch
from bd3_scale.data.index import read_index
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.shards import Shards, open_shards
from bd3_scale.data.stream import TrainingStream, held_out_batches
from bd3_scale.recipe.schema import DataRecipe
from tests.data.documents import SEQ_LEN, used_bytes


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    """Copy the prepared data, so that no process has read this copy."""
    folder = tmp_path / "data"
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("*.mds"))
    return folder


def read_epoch(path: Path, **options: Any) -> list[Batch]:
    recipe = DataRecipe(**({"path": str(path), "seq_len": SEQ_LEN, "num_workers": 0} | options))
    manifest = load_manifest(path, recipe.remote)
    stream = TrainingStream(recipe, manifest, global_batch_size=4, dp_rank=0, dp_size=1, seed=3)
    return list(itertools.islice(stream, manifest.train.sequences // 4))


def ids(batches: list[Batch]) -> list[list[int]]:
    return [batch.ids.tolist() for batch in batches]


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_flipped_byte_in_a_packed_shard(data: Path, num_workers: int) -> None:
    flip_a_byte(data / "train" / "shard.00001.mds.zstd")
    with pytest.raises(ValueError, match=r"train/shard\.00001\.mds\.zstd is damaged.* prepare the data again") as info:
        read_epoch(data, num_workers=num_workers)
    # Frees the loader now: the garbage collector would end its queues first, and then wait for each worker in vain.
    traceback.clear_frames(info.tb)


@pytest.mark.timeout(30)
def test_a_damaged_shard_keeps_nobody_waiting(data: Path) -> None:
    flip_a_byte(data / "train" / "shard.00001.mds.zstd")
    shards = Shards(str(data), None, None, "train", read_index(data / "train" / "index.json"))
    for _ in range(2):
        with pytest.raises(ValueError, match="is damaged"):
            shards.files.prepare(1)


@pytest.mark.parametrize(
    "damage", [flip_a_byte, lambda file: file.write_bytes(b""), lambda file: os.truncate(file, 99999)]
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_unpacked_shard_is_unpacked_anew(
    data: Path, prepared: Path, damage, num_workers: int, caplog
) -> None:
    expected = read_epoch(prepared)
    sound = (prepared / "train" / "shard.00001.mds").read_bytes()
    shutil.copy(prepared / "train" / "shard.00001.mds", data / "train")
    damage(data / "train" / "shard.00001.mds")
    found = read_epoch(data, num_workers=num_workers)
    assert all((a.tokens == b.tokens).all() for a, b in zip(found, expected, strict=True))
    assert (data / "train" / "shard.00001.mds").read_bytes() == sound
    if num_workers == 0:
        assert (
            caplog.text.count("train/shard.00001.mds does not match its hash in index.json and is unpacked again") == 1
        )


def test_a_damaged_shard_of_a_cache_is_fetched_anew(data: Path, tmp_path: Path) -> None:
    expected = ids(read_epoch(tmp_path / "cache", remote=str(data)))
    # A process holds the cache that it has opened.
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "cache", again, ignore=shutil.ignore_patterns(".lock"))
    shard = again / "train" / "shard.00001.mds"
    sound = shard.read_bytes()
    flip_a_byte(shard)
    assert ids(read_epoch(again, remote=str(data))) == expected
    assert shard.read_bytes() == sound


def test_both_forms_of_a_shard_damaged(data: Path, prepared: Path) -> None:
    read_epoch(prepared)
    shutil.copy(prepared / "train" / "shard.00001.mds", data / "train")
    for name in ("shard.00001.mds", "shard.00001.mds.zstd"):
        flip_a_byte(data / "train" / name)
    with pytest.raises(ValueError, match=r"train/shard\.00001\.mds\.zstd is damaged"):
        read_epoch(data)


def test_unpacked_shards_alone_are_kept_and_what_they_lack_is_named(data: Path, prepared: Path) -> None:
    read_epoch(prepared)
    shutil.copy(prepared / "train" / "shard.00001.mds", data / "train")
    (data / "train" / "shard.00001.mds.zstd").unlink()
    with pytest.raises(FileNotFoundError, match=r"train/shard\.00001\.mds\.zstd is missing"):
        read_epoch(data)
    assert (data / "train" / "shard.00001.mds").is_file()


def test_a_packed_shard_that_would_fill_the_memory_is_refused(data: Path) -> None:
    bomb = zstandard.compress(bytes(300 << 20))
    (data / "train" / "shard.00001.mds.zstd").write_bytes(bomb)
    index = json.loads((data / "train" / "index.json").read_text())
    packed = index["shards"][1]["zip_data"]
    packed["bytes"], packed["hashes"]["xxh64"] = len(bomb), xxhash.xxh64(bomb).hexdigest()
    (data / "train" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"shard\.00001\.mds\.zstd is damaged: it would unpack to 300 MiB"):
        read_epoch(data)
    index["shards"][1]["raw_data"]["bytes"] = 300 << 20
    (data / "train" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json is damaged \(shards\.1\.raw_data\.bytes: .* less than"):
        read_epoch(data)


def test_a_remote_folder_gives_the_same_batches(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    through_cache = read_epoch(cache, remote=str(data))
    assert list(data.rglob("*.mds")) == []
    recipe = DataRecipe(path=str(cache), remote=str(data), seq_len=SEQ_LEN)
    held_out = held_out_batches(recipe, load_manifest(cache, str(data)), batch_size=4, dp_rank=0, dp_size=1)
    assert len(list(held_out)) > 1
    assert ids(through_cache) == ids(read_epoch(data))


def test_the_cache_limit_is_kept(data: Path, tmp_path: Path) -> None:
    index = json.loads((data / "train" / "index.json").read_text())
    sizes = [shard["raw_data"]["bytes"] + shard["zip_data"]["bytes"] for shard in index["shards"]]
    limit = 4 * max(sizes) + (data / "train" / "index.json").stat().st_size + 1024
    assert sum(sizes) > limit
    cache = tmp_path / "cache"
    recipe = DataRecipe(
        path=str(cache), remote=str(data), cache_limit=f"{limit // 1024}kb", seq_len=SEQ_LEN, num_workers=0
    )
    manifest = load_manifest(cache, str(data))
    stream = TrainingStream(recipe, manifest, global_batch_size=4, dp_rank=0, dp_size=1, seed=3)
    batches = []
    for batch in itertools.islice(stream, manifest.train.sequences // 4):
        batches.append(batch)
        assert used_bytes(cache / "train") <= limit
    assert ids(batches) == ids(read_epoch(data))


def test_a_cache_that_holds_not_even_four_shards_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.cache_limit is 3,072 bytes; it must .* at least 1mb"):
        read_epoch(tmp_path / "cache", remote=str(data), cache_limit="3kb", shuffle=False)


def test_a_damaged_download_is_thrown_away(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.05)
    good = (data / "train" / "shard.00001.mds.zstd").read_bytes()
    flip_a_byte(data / "train" / "shard.00001.mds.zstd")
    with pytest.raises(ValueError, match=r"shard\.00001\.mds\.zstd is damaged"):
        read_epoch(tmp_path / "cache", remote=str(data))
    (data / "train" / "shard.00001.mds.zstd").write_bytes(good)
    assert ids(read_epoch(tmp_path / "cache", remote=str(data))) == ids(read_epoch(data))


def test_missing_files(data: Path) -> None:
    (data / "train" / "shard.00002.mds.zstd").unlink()
    with pytest.raises(FileNotFoundError, match=r"train/shard\.00002\.mds\.zstd is missing"):
        read_epoch(data)
    (data / "train" / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"train/index\.json is missing"):
        read_epoch(data)


def test_a_mixture_of_two_preparations(data: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["train"]["sequences"] += 1
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="mixes two preparations"):
        read_epoch(data)


def test_no_held_out_split(data: Path) -> None:
    manifest = load_manifest(data).model_copy(update={"validation": None, "holdout": 0.0})
    with pytest.raises(ValueError, match=r"no validation split .*holdout=0\.0"):
        open_shards(DataRecipe(path=str(data), seq_len=SEQ_LEN), manifest, "validation")
