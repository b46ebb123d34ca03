"""Test that a run continued on another layout takes the same samples and masks, with the same losses."""

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
    "EP2": Layout(2, {"expert": 2}),
    "EP2 ZeRO-2": Layout(2, {"expert": 2, "zero_stage": 2}),
    "EP2 CP2": Layout(2, {"expert": 2, "context": 2}),
    "EP4 ZeRO-0": Layout(4, {"expert": 4, "zero_stage": 0}),
    "EP4": Layout(4, {"expert": 4}),
    "EP2 DP2 ZeRO-2": Layout(4, {"expert": 2, "zero_stage": 2}),
    "EP2 TP2": Layout(4, {"expert": 2, "tensor": 2, "sequence": True}),
    "EP2 PP2 VPP2": Layout(4, {"expert": 2, "pipeline": 2, "virtual_pipeline": 2}),
}
LION = {
    "family": "lion",
    "betas": [0.9, 0.99],
    "groups": [
        {"match": "*layernorm*", "lr_scale": 2, "weight_decay": 0.05},
        {"match": "embedding.*", "lr_scale": 0.3},
    ],
}
MIXTURE = {
    "num_experts": 8,
    "top_k": 2,
    "ffn_hidden_size": 16,
    "shared_ffn_hidden_size": 16,
    "first_dense_layers": 1,
    "bias": True,
    "bias_update_rate": 0.01,
    "aux_loss": 0.01,
    "z_loss": 0.001,
}
# What a run is of beside its layout: sections of its recipe.
KINDS: dict[str, dict] = {
    "dense": {},
    "lion": {"optimizer": LION},
    "mixture": {"model": {"moe": MIXTURE, "init_std": 0.2}},
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
# Between each two of EP1, 2 and 4, of the stages of ZeRO, and to and from what splits the model.
OF_MIXTURES = [
    ("1", "EP4"),
    ("EP4", "EP2 TP2"),
    ("EP2 TP2", "EP2 PP2 VPP2"),
    ("EP2 PP2 VPP2", "1"),
    ("EP4", "EP2 ZeRO-2"),
    ("EP2 ZeRO-2", "EP4 ZeRO-0"),
    ("EP4 ZeRO-0", "EP2 DP2 ZeRO-2"),
    ("EP2 DP2 ZeRO-2", "EP2 CP2"),
    ("EP2 CP2", "DP2 ZeRO-3"),
    ("DP2 ZeRO-3", "EP2 TP2"),
    ("EP2 PP2 VPP2", "TP2"),
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

    def run(self, name: str, layout: Layout, last: int, begin: Path | None = None, kind: str = "dense") -> Path:
        """Return the run directory of `layout` through step `last`, from the checkpoint of `begin` on."""
        run = self.folder / name
        if begin is not None:
            shutil.copytree(begin / "checkpoints", run / "checkpoints")
        sections = KINDS[kind]
        path = write_recipe(
            self.folder / f"{name}.yaml",
            model={"num_layers": 4, "num_query_groups": 4} | sections.get("model", {}),
            diffusion={"mask_rate_high": 0.9},
            data={"path": str(self.folder / "data"), "num_workers": layout.workers},
            train={"steps": 20, "global_batch_size": 24},
            evaluation={"every_steps": 0},
            guard={"replicas_every_steps": 4},
            optimizer=sections.get("optimizer", {}),
            parallel=layout.parallel,
            run_dir=str(run),
        )
        forks.run_ranks(go, layout.processes, load_recipe(path), last, run / "found", logs=run / "logs", timeout=120)
        return run

    def begun(self, name: str, kind: str = "dense") -> Path:
        """Train a run of layout `name` up to the cut, once."""
        key = f"{kind} begun {name}"
        if key not in self._made:
            self._made[key] = self.run(key, LAYOUTS[name], CUT, kind=kind)
        return self._made[key]

    def whole(self, kind: str) -> dict:
        """Train the run of one process without a cut, once."""
        key = f"{kind} whole"
        if key not in self._made:
            self._made[key] = self.run(key, Layout(1), LAST, kind=kind)
        return torch.load(self._made[key] / "found")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("topology"))


@pytest.mark.parametrize(("first", "then"), [*CORE, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)])
def test_on_another_layout_it_goes_on_as_if_nothing_had_been(place, first, then):
    check_goes_on(place, "dense", first, then)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"), [("TP2", "PP2 VPP2"), ("PP2 VPP2", "DP2 ZeRO-3"), ("DP2 ZeRO-3", "CP2"), ("DP2", "TP2")]
)
def test_lion_with_groups_goes_on_on_another_layout(place, first, then):
    check_goes_on(place, "lion", first, then)


@pytest.mark.parametrize(
    ("first", "then"), [("EP2", "PP2"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OF_MIXTURES)]
)
def test_experts_are_shared_out_otherwise_and_biases_go_with_them(place, first, then):
    begun, _ = check_goes_on(place, "mixture", first, then)
    with TensorReader(begun / "checkpoints" / f"step-{CUT:08d}") as saved:
        # Once, with the weights that a model has outside training.
        (name,) = (name for name in saved.shapes if name.endswith("expert_bias"))
        assert name == "ema.decoder.layers.mlp.router.expert_bias"
        bias = torch.as_tensor(saved.read(name, (0, 0), (3, 8)))
        assert saved.shapes[name] == (3, 8)
        assert bias.abs().max() > 0.01, "they have moved"
        assert saved.shapes["master.decoder.layers.mlp.experts.linear_fc1.weight"] == (3, 8, 2, 16, 32)
        assert saved.shapes["master.decoder.layers.mlp.linear_fc1.weight"] == (1, 128, 32)


def check_goes_on(place: Place, kind: str, first: str, then: str) -> tuple[Path, Path]:
    """Check a run that is cut on one layout and continued on another."""
    begun = place.begun(first, kind)
    run = place.run(f"{kind} {first} then {then}", LAYOUTS[then], LAST, begun, kind)
    check_together(begun, run, place.whole(kind))
    return begun, run


def check_together(begun: Path, run: Path, whole: dict) -> None:
    """Check that both parts together equal the undisturbed run, and that what was loaded is what was saved."""
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
def test_from_four_processes_to_one_and_on_to_two(place):
    one = place.run("four then one", LAYOUTS["1"], CUT + 2, place.begun("DP4"))
    two = place.run("four, one, two", LAYOUTS["DP2"], LAST, one)
    found, whole = [torch.load(run / "found") for run in (place.begun("DP4"), one, two)], place.whole("dense")
    assert [part["done"] for part in found] == [0, CUT, CUT + 2]
    assert found[0]["seen"] | found[1]["seen"] | found[2]["seen"] == whole["seen"]
    losses = [loss for part in found for loss in part["losses"]]
    assert losses == pytest.approx(whole["losses"], abs=1e-6)
