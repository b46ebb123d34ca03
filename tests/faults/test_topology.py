"""A run that goes on on another layout takes the same samples with the same masks, and the same losses."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from bd3_scale.checkpoint.tensors import TensorReader, same_bytes
from bd3_scale.recipe.load import load_recipe
from tests.faults.topology_ranks import go
from tests.support import forks
from tests.support.recipes import write_recipe

CUT, LAST = 4, 9


@dataclass(frozen=True)
class Layout:
    processes: int
    parallel: dict[str, int] = field(default_factory=dict)
    workers: int = 1


LAYOUTS = {
    "1": Layout(1),
    "1 without loader workers": Layout(1, workers=0),
    "TP2": Layout(2, {"tensor": 2}),
    "TP4": Layout(4, {"tensor": 4}),
    "PP2": Layout(2, {"pipeline": 2}),
    "PP2 VPP2": Layout(2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": Layout(2, {"context": 2}),
    "DP2": Layout(2, workers=3),
    "DP2 ZeRO-0": Layout(2, {"zero_stage": 0}),
    "DP2 ZeRO-2": Layout(2, {"zero_stage": 2}),
    "DP2 ZeRO-3": Layout(2, {"zero_stage": 3}),
    "DP3 ZeRO-3": Layout(3, {"zero_stage": 3}),
    "DP4": Layout(4, workers=2),
    "TP2 PP2": Layout(4, {"tensor": 2, "pipeline": 2}),
    "TP2 DP2 ZeRO-3": Layout(4, {"tensor": 2, "zero_stage": 3}),
}
LION = {
    "family": "lion",
    "betas": [0.9, 0.99],
    "groups": [
        {"match": "*layernorm*", "lr_scale": 2, "weight_decay": 0.05},
        {"match": "embedding.*", "lr_scale": 0.3},
    ],
}
CORE = [("TP2", "PP2 VPP2"), ("PP2 VPP2", "TP2"), ("DP2", "1"), ("DP2 ZeRO-3", "CP2")]
OTHERS = [
    ("1", "TP2"),
    ("TP2", "1"),
    ("1", "PP2"),
    ("PP2", "1"),
    ("1 without loader workers", "DP2"),
    ("DP2", "DP3 ZeRO-3"),
    ("DP3 ZeRO-3", "DP4"),
    ("DP4", "1"),
    ("DP2 ZeRO-0", "DP2"),
    ("DP2", "DP2 ZeRO-2"),
    ("DP2 ZeRO-2", "DP2 ZeRO-3"),
    ("DP2 ZeRO-3", "DP2 ZeRO-0"),
    ("CP2", "1"),
    ("1", "CP2"),
    ("TP4", "TP2 PP2"),
    ("TP2 PP2", "TP2 DP2 ZeRO-3"),
    ("TP2 DP2 ZeRO-3", "TP4"),
    ("1", "DP2 ZeRO-3"),
    ("DP2", "DP2 ZeRO-0"),
    ("DP2 ZeRO-2", "DP2"),
    ("DP2 ZeRO-3", "DP2 ZeRO-2"),
]


class Place:
    """A folder with data of less than five steps of 24 sequences an epoch, and what was computed there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = "".join(f"{number} times {number} is {number * number}, and so on. " for number in range(240))
        (folder / "text.txt").write_text(text)
        data = ["--tokenizer", "bytes", "--seq-len", 64, "--document-multiple", 16, "--holdout", 0, "--out", "data"]
        forks.bd3_scale("data", "prepare", "text.txt", *data, cwd=folder)
        sequences = json.loads((folder / "data" / "manifest.json").read_text())["train"]["sequences"]
        assert 1 <= sequences // 24 < LAST, "a run crosses the end of an epoch"
        self._made: dict[str, Path] = {}

    def run(self, name: str, layout: Layout, last: int, begin: Path | None = None, **optimizer: object) -> Path:
        """The run directory of `layout` through step `last`, from the checkpoint of `begin` on."""
        run = self.folder / name
        if begin is not None:
            shutil.copytree(begin / "checkpoints", run / "checkpoints")
        path = write_recipe(
            self.folder / f"{name}.yaml",
            model={"num_layers": 4, "num_query_groups": 4},
            diffusion={"mask_rate_high": 0.9},
            data={"path": str(self.folder / "data"), "num_workers": layout.workers},
            train={"steps": 20, "global_batch_size": 24},
            evaluation={"every_steps": 0},
            guard={"replicas_every_steps": 4},
            optimizer=optimizer,
            parallel=layout.parallel,
            run_dir=str(run),
        )
        forks.run_ranks(go, layout.processes, load_recipe(path), last, run / "found", logs=run / "logs", timeout=120)
        return run

    def begun(self, name: str, **optimizer: object) -> Path:
        """A run of layout `name` up to where it is cut, taken once."""
        key = f"{optimizer.get('family', '')} begun {name}".strip()
        if key not in self._made:
            self._made[key] = self.run(key, LAYOUTS[name], CUT, **optimizer)
        return self._made[key]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("topology"))


@pytest.fixture(scope="module")
def whole(place):
    """What a run of one process finds that nobody cuts."""
    return torch.load(place.run("whole", Layout(1), LAST) / "found")


@pytest.fixture(scope="module")
def lions_whole(place):
    return torch.load(place.run("lion's whole", Layout(1), LAST, **LION) / "found")


@pytest.mark.parametrize(("first", "then"), [*CORE, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)])
def test_on_another_layout_it_goes_on_as_if_nothing_had_been(place, whole, first, then):
    begun = place.begun(first)
    run = place.run(f"{first} then {then}", LAYOUTS[then], LAST, begun)
    check_together(begun, run, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"), [("TP2", "PP2 VPP2"), ("PP2 VPP2", "DP2 ZeRO-3"), ("DP2 ZeRO-3", "CP2"), ("DP2", "TP2")]
)
def test_lion_with_groups_goes_on_on_another_layout(place, lions_whole, first, then):
    begun = place.begun(first, **LION)
    run = place.run(f"lion: {first} then {then}", LAYOUTS[then], LAST, begun, **LION)
    check_together(begun, run, lions_whole)


def check_together(begun: Path, run: Path, whole: dict) -> None:
    """What was begun and what went on are together the undisturbed run, and what was loaded is what was saved."""
    before, after = torch.load(begun / "found"), torch.load(run / "found")
    assert (before["done"], after["done"]) == (0, CUT)
    assert {epoch for _, epoch, _ in whole["seen"]} >= {0, 1}
    assert before["seen"] | after["seen"] == whole["seen"]
    found = before["losses"] + after["losses"]
    assert found == pytest.approx(whole["losses"], abs=1e-6)
    step = f"step-{CUT:08d}"
    with TensorReader(begun / "checkpoints" / step) as old, TensorReader(run / "found.again" / step) as new:
        assert old.shapes == new.shapes
        for name, shape in old.shapes.items():
            origin = (0,) * len(shape)
            assert same_bytes(old.read(name, origin, shape), new.read(name, origin, shape)), name


@pytest.mark.slow
def test_from_four_processes_to_one_and_on_to_two(place, whole):
    one = place.run("four then one", LAYOUTS["1"], CUT + 2, place.begun("DP4"))
    two = place.run("four, one, two", LAYOUTS["DP2"], LAST, one)
    found = [torch.load(run / "found") for run in (place.begun("DP4"), one, two)]
    assert [part["done"] for part in found] == [0, CUT, CUT + 2]
    assert found[0]["seen"] | found[1]["seen"] | found[2]["seen"] == whole["seen"]
    losses = [loss for part in found for loss in part["losses"]]
    assert losses == pytest.approx(whole["losses"], abs=1e-6)
