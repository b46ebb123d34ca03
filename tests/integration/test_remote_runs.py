"""Train on data in an object store that fails meanwhile."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bd3_scale.data import split_writer
from bd3_scale.data.prepare import prepare
from bd3_scale.data.tokenizer import load_tokenizer
from tests.support import forks, s3
from tests.support.programs import BD3_SCALE
from tests.support.recipes import write_recipe, write_topics
from tests.support.runs import losses, nelbos, newest, records, tensors, wait_for

STEPS, STEP_DEADLINE = 10, 5
PIPELINE = {"parallel": {"pipeline": 2}, "evaluation": {"every_steps": 5, "sequences": 16, "draws": 2}}


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


def recipe(folder: Path, sections: dict[str, object] | None = None, **data: object) -> Path:
    """Write a recipe for two ranks whose next shards will soon be missing."""
    folder.mkdir(exist_ok=True)
    return write_recipe(
        folder / "recipe.yaml",
        data={"seq_len": 64, "num_workers": 1, "shuffle": False} | data,
        train={"steps": STEPS},
        checkpoint={"every_steps": 1},
        launch={"processes": 2, "deadlines": {"step": STEP_DEADLINE}},
        **sections or {},
    )


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, float]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    forks.bd3_scale("train", recipe(folder, path=str(data)), cwd=folder)
    return losses(folder / "runs/tiny")


@pytest.fixture(scope="module")
def undisturbed_pipeline(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    forks.bd3_scale("train", recipe(folder, PIPELINE, path=str(data)), cwd=folder)
    return folder / "runs/tiny"


@contextmanager
def two_nodes(recipe: Path, store: s3.Store) -> Iterator[list[forks.Program]]:
    """Run a rank on each of two nodes, with separate disks: cache0 and cache1 in the recipe's folder."""
    folder = recipe.parent
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(forks.free_port()), "OMP_NUM_THREADS": "1"}
    nodes = []
    try:
        for rank in range(2):
            command = [sys.executable, "-m", "bd3_scale.train", recipe, f"data.path={folder}/cache{rank}"]
            environment = os.environ | store.environment() | common | {"RANK": str(rank)}
            nodes.append(forks.Program(command, cwd=folder, env=environment))
        yield nodes
    finally:
        for node in nodes:
            node.end()


@pytest.mark.slow
def test_later_stages_of_a_pipeline_fetch_no_shard(store: s3.Store, undisturbed_pipeline: Path, tmp_path: Path) -> None:
    place = store.upload_copy("data", "pipeline")
    with two_nodes(recipe(tmp_path, PIPELINE, remote=place), store) as nodes:
        assert [node.wait() for node in nodes] == [0, 0], "".join(node.output() for node in nodes)
    run = tmp_path / "runs/tiny"
    assert losses(run) == losses(undisturbed_pipeline)
    assert nelbos(run) == nelbos(undisturbed_pipeline)
    assert set(nelbos(run)) == {5, STEPS}
    assert tensors(run, STEPS) == tensors(undisturbed_pipeline, STEPS)
    shards = {key: count for key, count in store.gets.items() if "/pipeline/" in key and "shard." in key}
    assert {key.rpartition("/")[0].rpartition("/")[2] for key in shards} == {"train", "validation"}
    assert set(shards.values()) == {1}
    kept = [{path.name for path in (tmp_path / f"cache{rank}").rglob("shard.*")} for rank in range(2)]
    assert kept[0]
    assert not kept[1]


@pytest.mark.slow
def test_data_that_the_first_stage_cannot_read_end_every_stage_with_the_same_line(
    store: s3.Store, tmp_path: Path
) -> None:
    place = store.upload_copy("data", "gone")
    store.client.delete_object(Bucket=s3.BUCKET, Key="gone/train/shard.00004.mds.zstd")
    with two_nodes(recipe(tmp_path, PIPELINE, remote=place), store) as nodes:
        codes = [node.wait() for node in nodes]
        said = [node.output() for node in nodes]
    assert codes == [2, 2], said
    for output in said:
        assert output.count("error: ") == 1, output
        assert "error: s3://corpus/gone/train/shard.00004.mds.zstd is not there (404): put it back" in output
        assert "Traceback" not in output
    assert 0 < len(losses(tmp_path / "runs/tiny")) < STEPS


@pytest.mark.parametrize("layout", [{}, pytest.param(PIPELINE, marks=pytest.mark.slow)], ids=["data", "pipeline"])
def test_an_outage_longer_than_a_step_may_take_is_no_hang(
    layout: dict[str, object], store: s3.Store, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    # The shard is chosen by name, since two ranks that prefetch ask for shards in any order.
    store.fail("cut", only="train/shard.00003")
    run = tmp_path / "runs/tiny"
    command = [BD3_SCALE, "train", recipe(tmp_path, layout, path="cache", remote=f"s3://{s3.BUCKET}/data")]
    program = forks.Program(command, cwd=tmp_path, env=os.environ | store.environment())
    try:
        wait_for(lambda: records(run))
        log = run / "logs/rank1.log"  # whichever rank reached it first
        told = "waiting for data: s3://corpus/data/train/shard."
        wait_for(lambda: told in program.output() + (log.read_text() if log.exists() else ""))
        time.sleep(STEP_DEADLINE + 3)
        stalled = len(losses(run))
        store.fail(None)
        assert program.wait() == 0, program.output()
        assert 0 < stalled < STEPS
        if layout:
            assert losses(run) == losses(request.getfixturevalue("undisturbed_pipeline"))
        else:
            assert losses(run) == request.getfixturevalue("undisturbed")
        steps = [record for record in records(run) if "train/loss" in record]
        # Rank 0 waited for its own batch, or for rank 1, which waited for its own.
        assert min(record["perf/tokens_per_second"] for record in steps) < 8 * 64 / STEP_DEADLINE
        # Either rank may have waited.
        assert max(record["data/wait_seconds"] for record in steps) >= STEP_DEADLINE
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "num_workers"), [({}, 0), ({}, 1), (PIPELINE, 1)], ids=["here", "worker", "pipeline"]
)
@pytest.mark.parametrize("away", ["train/shard.00003", "train/shard."])
def test_a_signal_ends_the_wait_for_a_remote_that_is_away(
    store: s3.Store,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    away: str,
    layout: dict[str, object],
    num_workers: int,
) -> None:
    store.fail("cut", only=away)
    run, command = tmp_path / "runs/tiny", [BD3_SCALE, "train"]
    command += [recipe(tmp_path, layout, path="cache", remote=f"s3://{s3.BUCKET}/data", num_workers=num_workers)]
    program = forks.Program(command, cwd=tmp_path, env=os.environ | store.environment())
    try:
        log = run / "logs/rank1.log"
        told = "waiting for data: s3://corpus/data/train/shard."
        wait_for(log.exists)
        wait_for(lambda: told in program.output() + log.read_text())
        time.sleep(4)  # until both wait, for data or for the one that does
        began, done = time.monotonic(), len(losses(run))
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 0, program.output()
        assert time.monotonic() - began < 8
        assert f"stopped after step {len(losses(run))} by" in " ".join(program.output().split())
        assert newest(run) == len(losses(run)) <= done + 1 < STEPS
        assert (newest(run) == 0) == (away == "train/shard.")
    finally:
        program.end()
    store.fail(None)
    forks.bd3_scale(*command[1:], cwd=tmp_path, env=os.environ | store.environment())
    if layout:
        assert losses(run) == losses(request.getfixturevalue("undisturbed_pipeline"))
    else:
        assert losses(run) == request.getfixturevalue("undisturbed")
