"""Trainings on data in an object store that fails meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bd3_scale.data import split_writer
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from tests.support import forks, s3
from tests.support.programs import BD3_SCALE
from tests.support.recipes import write_recipe, write_topics
from tests.support.runs import losses, records, wait_for

STEPS, STEP_DEADLINE = 10, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_writer, "SHARD_BYTES", 2048)
        options = {"document_multiple": 32, "holdout": 0.1, "workers": 1, "progress": False}
        prepare([write_topics(folder / "text")], folder / "data", load_tokenizer("bytes"), 64, **options)
    return folder / "data"


@pytest.fixture(scope="module")
def server(data: Path) -> Iterator[s3.Store]:
    with s3.serve() as store:
        store.upload(data, "data")
        yield store


@pytest.fixture
def store(server: s3.Store) -> Iterator[s3.Store]:
    yield server
    server.fail(None)


def recipe(folder: Path, **data: object) -> Path:
    """Of two ranks whose next shards are soon not there yet."""
    folder.mkdir(exist_ok=True)
    return write_recipe(
        folder / "recipe.yaml",
        data={"seq_len": 64, "num_workers": 1, "shuffle": False} | data,
        train={"steps": STEPS},
        checkpoint={"every_steps": 1},
        launch={"processes": 2, "deadlines": {"step": STEP_DEADLINE}},
    )


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, float]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    forks.bd3_scale("train", recipe(folder, path=str(data)), cwd=folder)
    return losses(folder / "runs/tiny")


def test_an_outage_longer_than_a_step_may_take_is_no_hang(
    store: s3.Store, undisturbed: dict[int, tuple[float, float]], tmp_path: Path
) -> None:
    # By its name: two ranks that fetch ahead ask for shards in whatever order.
    store.fail("cut", only="train/shard.00003")
    run = tmp_path / "runs/tiny"
    command = [BD3_SCALE, "train", recipe(tmp_path, path="cache", remote=f"s3://{s3.BUCKET}/data")]
    program = forks.Program(command, cwd=tmp_path, env=os.environ | store.environment())
    try:
        wait_for(lambda: records(run))
        log = run / "logs/rank1.log"  # whichever rank met it first
        told = "waiting for data: s3://corpus/data/train/shard."
        wait_for(lambda: told in program.output() + (log.read_text() if log.exists() else ""))
        time.sleep(STEP_DEADLINE + 3)
        stalled = len(losses(run))
        store.fail(None)
        assert program.wait() == 0, program.output()
        assert 0 < stalled < STEPS
        assert losses(run) == undisturbed
        steps = [record for record in records(run) if "train_loss" in record]
        # Rank 0 waited for its batch, or for rank 1, which waited for its own.
        assert min(record["tokens_per_second"] for record in steps) < 8 * 64 / STEP_DEADLINE
        assert all(record["data/wait_seconds"] >= 0 for record in steps)
        assert {record["data/downloads_per_shard"] for record in steps} == {1}
    finally:
        program.end()


def test_a_key_that_goes_ends_the_run_with_one_line_and_it_goes_on_when_it_is_back(
    store: s3.Store, undisturbed: dict[int, tuple[float, float]], tmp_path: Path
) -> None:
    place = store.upload_copy("data", "going")
    gone = {"Bucket": s3.BUCKET, "Key": "going/train/shard.00004.mds.zstd"}
    body = store.client.get_object(**gone)["Body"].read()
    store.client.delete_object(**gone)
    path, environment = recipe(tmp_path, path="cache", remote=place), os.environ | store.environment()
    began = time.monotonic()
    done = forks.run([BD3_SCALE, "train", path], cwd=tmp_path, env=environment, timeout=80)
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert time.monotonic() - began < 60
    assert "error: s3://corpus/going/train/shard.00004.mds.zstd is not there (404): put it back" in output
    assert "waiting for data" not in output
    assert 0 < len(losses(tmp_path / "runs/tiny")) < STEPS
    store.client.put_object(**gone, Body=body)
    forks.bd3_scale("train", path, cwd=tmp_path, env=environment)
    assert losses(tmp_path / "runs/tiny") == undisturbed
