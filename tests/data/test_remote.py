"""Test data in a failing object store: a real S3 server behind a proxy that cuts, slows, refuses and truncates."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bd3_scale.data import remote
from bd3_scale.data.batch import Batch
from bd3_scale.data.describe import description
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.stored import StoredData, stored_data
from bd3_scale.data.stream import TrainingStream
from bd3_scale.data.verify import problems
from bd3_scale.recipe.schema import DataRecipe
from bd3_scale.resilience.signals import StopRequestedError
from tests.data.documents import SEQ_LEN, steps_per_epoch
from tests.support import s3

pytestmark = pytest.mark.launch
PLACE = "s3://corpus/data/train/shard.00003.mds.zstd"


@pytest.fixture(scope="module")
def server(prepared: Path) -> Iterator[s3.Store]:
    with s3.serve() as store:
        store.upload(prepared, "data")
        yield store


@pytest.fixture
def store(server: s3.Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Store]:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(remote, "_OUTAGE", remote._Outage())
    server.gets.clear()
    server.faults = 0
    yield server
    server.fail(None)


def stream_of(cache: Path, place: str | None = f"s3://{s3.BUCKET}/data", **options: Any) -> TrainingStream:
    recipe = DataRecipe(**({"path": str(cache), "remote": place, "seq_len": SEQ_LEN, "num_workers": 0} | options))
    manifest = load_manifest(cache, place, retry_minutes=recipe.retry_minutes)
    return TrainingStream(recipe, manifest, global_batch_size=4, dp_rank=0, dp_size=1, seed=3)


def seen(batches: list[Batch]) -> list[list[list[int]]]:
    return [[batch.ids.tolist(), *batch.tokens.tolist()] for batch in batches]


@pytest.fixture(scope="module")
def expected(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    """Return an epoch of the same data, read from a folder."""
    folder = tmp_path_factory.mktemp("expected") / "data"
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("*.mds"))
    stream = stream_of(folder, None)
    return seen(list(itertools.islice(stream, steps_per_epoch(folder))))


@pytest.mark.parametrize(("fault", "num_workers"), [("cut", 2), ("503", 0), ("truncated", 0), ("slow", 2)])
def test_a_fault_loses_nothing(
    store: s3.Store, expected: list, tmp_path: Path, fault: str, num_workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    store.seconds = 0.05
    # A cut body comes twice at the most: the third time it would lie there like that.
    store.fail(fault, times={"truncated": 2, "503": 1}.get(fault, 6))
    stream = stream_of(tmp_path / "cache", num_workers=num_workers)
    found = list(itertools.islice(stream, steps_per_epoch(tmp_path / "cache")))
    assert seen(found) == expected
    assert store.times == 0
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("waiting for data: ")]
    # Two workers may find it so at the same moment.
    assert bool(told) == (fault != "slow")
    assert len(told) <= 1 + (num_workers > 1)
    if told:
        words = {"cut": "ConnectionClosedError", "503": "503", "truncated": "does not match its hash"}[fault]
        assert words in told[0]
        assert "for 30 more minutes (data.retry_minutes)" in told[0]


def test_manifest_and_index_are_asked_for_again(store: s3.Store, expected: list, tmp_path: Path) -> None:
    for number, (fault, name) in enumerate((("truncated", "index.json"), ("cut", "token"))):
        store.fail(fault, times=2, only=name)
        stream = stream_of(tmp_path / f"cache-{number}")
        assert store.times == 0
        assert seen([next(stream)]) == expected[:1]


def test_what_ends_a_wait_is_not_tried_again() -> None:
    tries = []

    def asked_to_stop() -> None:
        tries.append(1)
        raise StopRequestedError

    with pytest.raises(StopRequestedError):
        remote.with_retries(asked_to_stop, "s3://corpus/data", 0.05)
    assert len(tries) == 1


@pytest.mark.slow
def test_what_is_looked_at_is_asked_for_again(store: s3.Store, prepared: Path, tmp_path: Path) -> None:
    (there,), here = stored_data([f"s3://{s3.BUCKET}/data/"]), StoredData(str(prepared))
    store.fail("cut", times=3, only="")
    assert description(there) == description(here) | {"data": there.place}
    assert store.faults == 3
    # What comes cut is found by its hash.
    store.fail("truncated", times=2)
    assert list(problems(there)) == []
    assert store.faults == 5
    store.fail("truncated", times=remote.MAX_DAMAGED_TRIES)
    (told,) = problems(there)
    assert told.startswith("s3://corpus/data/train/shard.00000.mds.zstd is damaged: it has ")
    store.fail("cut")
    found = list(problems(StoredData(there.place, retry_minutes=0.002)))
    assert len(found) == len(here.shards("train")) + len(here.shards("validation"))
    assert "has not come for 0.002 minutes" in found[0]
    with pytest.raises(FileNotFoundError, match=r"s3://corpus/nowhere/manifest.json is not there \(404\)"):
        description(StoredData(f"s3://{s3.BUCKET}/nowhere"))


def test_a_remote_that_stays_away_ends_with_one_line(store: s3.Store, tmp_path: Path) -> None:
    stream = stream_of(tmp_path / "cache", retry_minutes=0.02)
    store.fail("cut")
    began = time.monotonic()
    with pytest.raises(
        ConnectionError, match=r"^s3://corpus/data/train/shard\.\S* has not come for 0\.02 minutes "
    ) as e:
        list(itertools.islice(stream, steps_per_epoch(tmp_path / "cache")))
    assert 1 < time.monotonic() - began < 10
    assert "\n" not in str(e.value)
    assert "continues from its last checkpoint" in str(e.value)


def test_a_key_that_goes_in_mid_run_is_named_at_once(store: s3.Store, tmp_path: Path, expected: list) -> None:
    place = store.upload_copy("data", "going")
    stream = stream_of(tmp_path / "cache", place)
    next(stream)
    store.client.delete_object(Bucket=s3.BUCKET, Key="going/train/shard.00003.mds.zstd")
    with pytest.raises(
        FileNotFoundError, match=r"^s3://corpus/going/train/shard\.00003\.mds\.zstd is not there \(404\)"
    ):
        list(itertools.islice(stream, steps_per_epoch(tmp_path / "cache")))


@pytest.mark.parametrize(
    ("environment", "place", "error", "words"),
    [
        ({}, "s3://corpus/nowhere", FileNotFoundError, "s3://corpus/nowhere/manifest.json is not there (404)"),
        ({}, "s3://no-bucket/data", FileNotFoundError, "s3://no-bucket/data/manifest.json is not there (404)"),
        ({}, "s3://no_bucket!/data", ValueError, "Invalid bucket name"),
        ({}, "s4://corpus/data", ValueError, "Unsupported remote path"),
        ({"AWS_ACCESS_KEY_ID": "wrong"}, "s3://corpus/data", PermissionError, "may not be read (403)"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "s3://corpus/data", ValueError, "credentials"),
        ({"S3_ENDPOINT_URL": "nonsense"}, "s3://corpus/data", ValueError, "Invalid endpoint"),
        ({"AWS_PROFILE": "nobody"}, "s3://corpus/data", ValueError, "nobody"),
    ],
)
def test_what_a_person_must_mend_is_told_at_once(
    store: s3.Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str | None],
    place: str,
    error: type[Exception],
    words: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(error) as raised:
        load_manifest(tmp_path / "cache", place)
    assert time.monotonic() - began < 5
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
