"""Check on two tensor-parallel ranks that reporting changes no number, and that a resumed run shows each step once."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from bd3_scale.train.garbage import COLLECT_EVERY
from tests.support import forks
from tests.support.recipes import write_recipe
from tests.support.runs import losses, records, tensor_files

STEPS, PROMPTS = 8, ["def ", "The "]
WATCHED = [
    f"evaluation.prompts={json.dumps(PROMPTS)}",
    "evaluation.prompt_tokens=12",
    "logging.tensorboard=true",
    "train.profile={steps: [3, 4], memory: true, ranks: [0, 1]}",
]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(place: Path, run: str, *overrides: str) -> str:
    return forks.bd3_scale("train", "recipe.yaml", f"run_dir={run}", *overrides, cwd=place)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, topics: Path) -> Path:
    """Make a folder with a run that shows nothing, one that shows everything, and one that was killed and resumed."""
    folder = tmp_path_factory.mktemp("watched")
    shutil.copytree(topics, folder / "data")
    write_recipe(
        folder / "recipe.yaml",
        parallel={"tensor": 2},
        train={"steps": STEPS, "global_batch_size": 4},
        evaluation={"every_steps": 4, "sequences": 4},
        checkpoint={"every_steps": 4},
    )
    train(folder, "plain")
    (folder / "said").write_text(train(folder, "watched", *WATCHED))
    # The state after a kill that follows the last evaluation, before that step's checkpoint is written.
    shutil.copytree(folder / "watched", folder / "resumed")
    shutil.rmtree(folder / f"resumed/checkpoints/step-{STEPS:08d}")
    (folder / "resumed/checkpoints/latest").unlink(missing_ok=True)
    (folder / "resumed/profile/rank0-steps-3-4.json.gz").write_bytes(b"as it was")
    train(folder, "resumed", *WATCHED)
    return folder


def test_what_is_shown_changes_no_number(place: Path) -> None:
    for run in ("watched", "resumed"):
        assert losses(place / run) == losses(place / "plain")
        assert tensor_files(place / run, STEPS) == tensor_files(place / "plain", STEPS)


def test_samples_are_what_generate_writes_from_the_checkpoint_and_stand_there_once(place: Path) -> None:
    samples = lines(place / "watched/samples.jsonl")
    assert [(s["step"], s["kind"], s["prompt"]) for s in samples] == [
        (step, "sample", prompt) for step in (4, 8) for prompt in PROMPTS
    ]
    assert len({s["text"] for s in samples}) == 4
    assert lines(place / "resumed/samples.jsonl") == samples
    options = ["--max-new-tokens", "12", "--min-entropy", "0", "--json"]
    for number, sample in enumerate(samples[2:]):
        seed = 1 + STEPS * 2**20 + number
        written = forks.bd3_scale(
            "generate", "watched", "--prompt", sample["prompt"], "--seed", seed, *options, cwd=place
        )
        assert json.loads(written)["text"] == sample["text"]
        assert json.loads(written)["nfe"] == sample["nfe"]
    assert not (place / "plain/samples.jsonl").exists()
    assert len(re.findall(r"\[rank 0\] step 8: sample def", (place / "said").read_text())) == 1


@pytest.mark.slow
def test_samples_of_another_layout_are_the_same(place: Path) -> None:
    layout = ["parallel.tensor=1", "parallel.context=2", "parallel.zero_stage=2", "launch.processes=2"]
    train(place, "context", *WATCHED[:2], *layout)
    assert lines(place / "context/samples.jsonl") == lines(place / "watched/samples.jsonl")


def test_the_profile_is_of_the_steps_and_ranks_that_were_named(place: Path) -> None:
    folder = place / "watched/profile"
    assert {path.name for path in folder.iterdir()} == {f"rank{rank}-steps-3-4.json.gz" for rank in (0, 1)}
    with gzip.open(folder / "rank0-steps-3-4.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events]
    assert "aten::mm" in names
    assert "[memory]" in names, "on a CPU memory is recorded as events"
    # Each optimiser (ZeRO's, and the one that it calls) steps equally often in both steps.
    stepped = Counter(name for name in names if str(name).startswith("Optimizer.step#"))
    assert stepped
    assert all(count % 2 == 0 for count in stepped.values())
    assert f"profile of steps 3 to 4: {Path('watched/profile/rank0-steps-3-4.json.gz')}" in (place / "said").read_text()
    assert (place / "resumed/profile/rank0-steps-3-4.json.gz").read_bytes() == b"as it was"


def test_each_attempt_leaves_its_environment(place: Path) -> None:
    first, second = (
        json.loads((place / f"resumed/attempts/{number:04}/environment.json").read_text()) for number in (0, 1)
    )
    assert [(one["attempt"], one["from_step"], one["world_size"]) for one in (first, second)] == [(0, 0, 2), (1, 4, 2)]
    assert first["layout"] == {
        **dict.fromkeys(("pipeline", "context", "expert", "data", "zero_stage"), 1),
        "tensor": 2,
    }
    assert datetime.fromisoformat(first["began"]) < datetime.fromisoformat(second["began"])
    assert first["command"].startswith("bd3-scale train recipe.yaml run_dir=watched ")
    assert len(first["hosts"]) == 2
    assert first["versions"]["torch"]
    assert first["environment"]["OMP_NUM_THREADS"]
    assert not any("SECRET" in name for name in first["environment"])


def test_tensorboard_has_what_the_metrics_have(place: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place / "resumed/tensorboard"), size_guidance={"scalars": 0}).Reload()
    for name in ("train/loss", "eval/nelbo", "perf/step_seconds"):
        expected = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records(place / "resumed") if name in r]
        found = {event.step: event.value for event in events.Scalars(name)}
        assert sorted(found.items()) == expected
    assert {"samples/0/text_summary", "samples/1/text_summary"} < set(events.Tags()["tensors"])


def test_parts_of_a_step_are_no_more_than_the_step(place: Path) -> None:
    steps = [record for record in records(place / "watched") if "train/loss" in record]
    assert len(steps) == STEPS
    for record in steps:
        parts = [record[f"perf/{part}_seconds"] for part in ("forward_backward", "optimizer", "data")]
        assert all(part >= 0 for part in parts)
        assert 0 < sum(parts) <= record["perf/step_seconds"]
        assert record["perf/tokens_per_second"] == pytest.approx(4 * 64 / record["perf/step_seconds"])


def test_the_console_of_rank_0_is_kept_over_attempts(place: Path) -> None:
    log = (place / "resumed/logs/rank0.log").read_text().splitlines()
    stamped = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[rank 0\] (.+)", line) for line in log]
    assert all(stamped), log
    said = [match[1] for match in stamped if match]
    assert said.count("a new run in watched") == said.count("resumed after step 4") == 1
    of_first = [re.sub(r"\S+ \S+ \[rank 0\] ", "", line) for line in (place / "said").read_text().splitlines()]
    assert said[: len(of_first)] == of_first


def test_a_profile_that_cannot_be_written_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bd3_scale.recipe.training import ProfileRecipe
    from bd3_scale.train import profiler

    monkeypatch.setattr(profiler.dist, "get_rank", lambda: 0)
    (tmp_path / "profile").write_text("a file where the folder belongs")
    said: list[str] = []
    with profiler.StepProfiler(ProfileRecipe(steps=(2, 2)), tmp_path, said.append) as profile:
        for step in (1, 2, 3):
            profile.before(step)
            profile.after(step)
    (message,) = said
    assert message.startswith(f"profile of steps 2 to 2: NOT WRITTEN to {tmp_path / 'profile'}: ")


def test_garbage_waits_for_fixed_steps() -> None:
    import gc

    from bd3_scale.train.garbage import scheduled_garbage_collection

    class Node:
        alive = 0

        def __init__(self) -> None:
            self.itself = self
            Node.alive += 1

        def __del__(self) -> None:
            Node.alive -= 1

    with scheduled_garbage_collection() as after:
        for step in range(1, COLLECT_EVERY + 1):
            _ = [Node() for _ in range(20)]
            assert Node.alive >= 20 * step
            after(step)
        assert Node.alive <= 20
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
