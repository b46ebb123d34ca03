"""Test the thread that prefetches shards of later batches, with a slow remote."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from bd3_scale.data import prefetch
from bd3_scale.data import stream as stream_module
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.mosaicml import CloudDownloader
from bd3_scale.data.stream import TrainingStream
from bd3_scale.recipe.schema import DataRecipe
from tests.data.documents import SEQ_LEN, steps_per_epoch, used_bytes

LocalDownloader = type(CloudDownloader.get(None))
MAIN = threading.main_thread().name


class Downloads:
    """By whom shards are fetched, each of which takes a while."""

    def __init__(self, patch: pytest.MonkeyPatch, seconds: float) -> None:
        self.by: list[tuple[str, str]] = []
        real = LocalDownloader._download_file_impl

        def slow(downloader: CloudDownloader, remote: str, local: str, timeout: float) -> None:
            if "shard" in remote:
                self.by.append((threading.current_thread().name, Path(remote).name))
                time.sleep(seconds)
            real(downloader, remote, local, timeout)

        patch.setattr(LocalDownloader, "_download_file_impl", slow)

    @property
    def counts(self) -> Counter[str]:
        return Counter(name for _, name in self.by)


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "data", ignore=shutil.ignore_patterns("*.mds"))
    return tmp_path / "data"


def open_stream(cache: Path, data: Path, **options: object) -> TrainingStream:
    recipe = DataRecipe(path=str(cache), remote=str(data), seq_len=SEQ_LEN, num_workers=0, **options)
    manifest = load_manifest(cache, str(data))
    return TrainingStream(recipe, manifest, global_batch_size=4, dp_rank=0, dp_size=1, seed=3)


def test_what_batches_need_is_here_before_they_ask(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = Downloads(monkeypatch, 0.02)
    stream = open_stream(tmp_path / "cache", data, shuffle=False)
    next(stream)
    shards = len(list((data / "train").glob("*.zstd")))
    deadline = time.monotonic() + 20
    while len(downloads.by) < shards and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    # The first batch may have been as quick as the thread.
    assert Counter(name for thread, name in downloads.by[1:] if thread == MAIN) == {}
    before = list(downloads.by)
    list(itertools.islice(stream, 3 * steps_per_epoch(data)))
    assert downloads.by == before
    assert set(downloads.counts.values()) == {1}
    assert stream.downloads_per_shard == 1


@pytest.mark.parametrize(("shards_in_cache", "looks_ahead"), [(4, 24), (6, 24), (4, 1 << 16), (7, 1 << 16)])
def test_a_small_cache_makes_it_fetch_nothing_twice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards_in_cache: int, looks_ahead: int
) -> None:
    monkeypatch.setattr(prefetch, "PREFETCH_SEQUENCES", looks_ahead)
    downloads = Downloads(monkeypatch, 0.002)
    sizes = [file.stat().st_size for file in (data / "train").glob("*.zstd")]
    limit = shards_in_cache * (2048 + 1024 + max(sizes)) + (data / "train" / "index.json").stat().st_size
    counts = {}
    for name in ("with", "without"):
        downloads.by.clear()
        with monkeypatch.context() as patch:
            if name == "without":
                patch.setattr(stream_module, "prefetch_shards", lambda shards, places, batch_size: places)
            stream = open_stream(tmp_path / name, data, shuffle=False, cache_limit=f"{limit // 1024}kb")
            for _ in itertools.islice(stream, steps_per_epoch(data)):
                assert used_bytes(tmp_path / name / "train") <= limit
                time.sleep(0.005)  # the thread has time to do too much
        counts[name] = downloads.counts
    assert counts["with"].keys() == counts["without"].keys()
    # What it knows of the next epoch is another matter.
    assert {n for n, count in counts["with"].items() if count > 1} <= {"shard.00000.mds.zstd", "shard.00001.mds.zstd"}


def test_what_it_raises_comes_with_the_batch_that_needs_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = Downloads(monkeypatch, 0)
    stream = open_stream(tmp_path / "cache", data, shuffle=False)
    (data / "train" / "shard.00004.mds.zstd").unlink()
    made = [next(stream)]
    deadline = time.monotonic() + 20
    while "shard.00004.mds.zstd" not in downloads.counts and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(FileNotFoundError, match=r"shard\.00004\.mds\.zstd is not there"):
        made.extend(iter(stream))
    (shards,) = stream._shards.values()
    assert {int(shard) for batch in made for shard in shards.of(batch.ids.numpy())} == {0, 1, 2, 3}
    assert downloads.counts["shard.00004.mds.zstd"] == 1
