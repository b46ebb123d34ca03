from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from bd3_scale.data.batch import Batch
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.stream import TrainingStream, held_out_batches
from bd3_scale.recipe.schema import DataRecipe
from tests.data.documents import SEQ_LEN

GLOBAL_BATCH = 12


def recipe(path: Path, **options: Any) -> DataRecipe:
    return DataRecipe(**({"path": str(path), "seq_len": SEQ_LEN, "num_workers": 0} | options))


def open_stream(path: Path, **options: Any) -> TrainingStream:
    layout = {"global_batch_size": GLOBAL_BATCH, "dp_rank": 0, "dp_size": 1, "seed": 7, "step": 0}
    own = {name: options.pop(name) for name in list(options) if name in layout}
    return TrainingStream(recipe(path, **options), load_manifest(path), **(layout | own))


def take(stream: TrainingStream, count: int) -> list[Batch]:
    return list(itertools.islice(stream, count))


@pytest.fixture(scope="module")
def reference(prepared: Path) -> list[Batch]:
    """Return two and a half epochs as one process without workers sees them."""
    stream = open_stream(prepared)
    return take(stream, load_manifest(prepared).train.sequences // GLOBAL_BATCH * 5 // 2)


def test_batches_hold_what_was_prepared(prepared: Path, reference: list[Batch]) -> None:
    manifest = load_manifest(prepared)
    steps_per_epoch = manifest.train.sequences // GLOBAL_BATCH
    in_order = take(open_stream(prepared, shuffle=False), steps_per_epoch)
    tokens = {int(i): row for batch in in_order for i, row in zip(batch.ids, batch.tokens, strict=True)}
    assert list(tokens) == list(range(steps_per_epoch * GLOBAL_BATCH))
    for step, batch in enumerate(reference):
        assert set(batch.epochs.tolist()) == {step // steps_per_epoch}
        assert batch.slots.tolist() == list(range(GLOBAL_BATCH))
        for i, row in zip(batch.ids, batch.tokens, strict=True):
            if int(i) in tokens:
                assert torch.equal(row, tokens[int(i)])
    first, second = (
        torch.cat([batch.ids for batch in reference if batch.epochs[0] == epoch]).tolist() for epoch in (0, 1)
    )
    assert len(set(first)) == len(first) == len(set(second)) == steps_per_epoch * GLOBAL_BATCH
    assert first != second


@pytest.mark.launch
def test_every_layout_sees_the_same_global_batches(prepared: Path, reference: list[Batch], tmp_path: Path) -> None:
    steps_per_epoch = load_manifest(prepared).train.sequences // GLOBAL_BATCH
    layouts = itertools.product((0, 2), (1, 2), (3, steps_per_epoch - 2))  # the last goes on in the next epoch
    cases = [
        {"num_workers": workers, "replicas": replicas, "step": step, "count": 4}
        | {"global_batch_size": GLOBAL_BATCH, "seed": 7}
        for workers, replicas, step in layouts
    ]
    plan = {"worlds": [2, 4], "worlds_with_group": [2], "out": str(tmp_path), "cases": cases}
    plan |= {"data": {"path": str(prepared), "seq_len": SEQ_LEN}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    script = Path(__file__).with_name("stream_ranks.py")
    subprocess.run([sys.executable, script, tmp_path / "plan.json"], check=True, timeout=200)
    for world in plan["worlds"]:
        ranks = [json.loads((tmp_path / f"{rank}-of-{world}.json").read_text()) for rank in range(world)]
        for number, case in enumerate(cases):
            check_layout(case, [rank[number] for rank in ranks], reference)
    # Where ranks know each other, one of them reads the index of each split.
    opened = [json.loads((tmp_path / f"{rank}-of-2.opened").read_text()) for rank in range(2)]
    assert opened == [[str(prepared / split / "index.json") for split in ("train", "validation")], []]


def check_layout(case: dict[str, Any], results: list[dict[str, Any]], reference: list[Batch]) -> None:
    for one, other in itertools.combinations(results, 2):
        assert (one == other) == (one["dp_rank"] == other["dp_rank"])
    leaders = results[:: case["replicas"]]
    for offset in range(case["count"]):
        expected = reference[case["step"] + offset]
        parts = [result["train"][offset] for result in leaders]
        for name in ("ids", "epochs", "slots", "tokens"):
            assert list(itertools.chain(*(part[name] for part in parts))) == getattr(expected, name).tolist()
    held_out = [batch["ids"] for result in leaders for batch in result["held_out"]]
    assert sorted(i for i in itertools.chain(*held_out) if i >= 0) == list(range(11))
    assert len({tuple(len(batch["ids"]) for batch in result["held_out"]) for result in leaders}) == 1


def test_held_out_batches_in_order(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    total = manifest.validation.sequences
    batches = list(held_out_batches(recipe(prepared), manifest, batch_size=4, dp_rank=0, dp_size=1))
    filling = -total % 4
    assert torch.cat([batch.ids for batch in batches]).tolist() == [*range(total), *[-1] * filling]
    assert all(torch.equal(batch.ids, batch.slots) and not batch.epochs.any() for batch in batches)
    assert {len(batch.ids) for batch in batches} == {4}
    assert sum(int(batch.counted.sum()) for batch in batches) == manifest.validation.counted_tokens
    second = held_out_batches(recipe(prepared), manifest, batch_size=4, dp_rank=1, dp_size=2, sequences=5)
    assert [batch.ids.tolist() for batch in second] == [[1, 3, -1]]


def test_a_stream_leaves_the_generator_of_training_alone(prepared: Path) -> None:
    before = torch.get_rng_state()
    take(open_stream(prepared, num_workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_workers_leave_signals_to_the_rank(prepared: Path, reference: list[Batch]) -> None:
    before = set(psutil.Process().children())
    stream = open_stream(prepared, num_workers=2)
    take(stream, 1)
    workers = set(psutil.Process().children()) - before
    assert len(workers) == 2
    for name in ("TERM", "USR1", "INT", "HUP"):
        subprocess.run(["/bin/kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    later = take(stream, len(reference) - 1)
    assert [batch.ids.tolist() for batch in later] == [batch.ids.tolist() for batch in reference[1:]]
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)  # from the rank itself
    assert len(psutil.wait_procs(workers, timeout=10)[0]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 10, "dp_size": 4}, "global_batch_size=10 must be a multiple of the 4"),
        ({"global_batch_size": 10_000}, "global_batch_size=10000 exceeds the .* training sequences"),
        ({"seq_len": 64}, "set data.seq_len=32 or prepare"),
    ],
)
def test_what_does_not_fit_is_refused(prepared: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_stream(prepared, **options)
