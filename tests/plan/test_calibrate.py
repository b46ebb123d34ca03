"""Check that measured results replace assumptions, predict the measured step, and are refused on other hardware."""

from __future__ import annotations

import json

import pytest

from bd3_scale.plan.calibrate import calibrate
from bd3_scale.plan.hardware import load_hardware

HARDWARE = load_hardware("h100")
# The shape is a GPU's; the rest is as `python tools/bench_step.py --preset small --objective bd3 --json` prints it.
STEP = {
    "hardware": HARDWARE.device,
    "processes": 1,
    "shape": {
        "model": {"num_layers": 2, "hidden_size": 1024, "num_attention_heads": 8, "ffn_hidden_size": 4096},
        "diffusion": {"block_size": 16},
        "train": {"steps": 1, "global_batch_size": 4, "micro_batch_size": 4, "precision": "bf16"},
        "parallel": {},
        "seq_len": 4096,
        "vocabulary": 32000,
    },
    "deterministic": True,
}
SECONDS = {"data": 0.01, "forward": 0.04, "backward": 0.05, "optimizer": 0.01, "step": 0.11}
ATTENTION = [
    {"hardware": f"{HARDWARE.device}, CUDA 13.0"},
    {"case": "a", "pass": "forward", "rate": 4.0e14},
    {"case": "b", "pass": "forward", "rate": 4.2e14},
    {"case": "c", "pass": "forward", "rate": 5.0e14},
    {"case": "a", "pass": "backward", "rate": 3.0e14},
    {"case": "a", "pass": "backward, deterministic", "rate": 2.0e14},
]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(name, *objects):
        path = tmp_path / name
        path.write_text("".join(json.dumps(each) + "\n" for each in objects))
        return path

    return write


def step(factor=1.0, **changes):
    seconds = {name: value * factor for name, value in SECONDS.items()}
    return STEP | changes | {"rows": [{"objective": "ar", "seconds": {}}, {"objective": "bd3", "seconds": seconds}]}


@pytest.mark.launch
def test_the_measured_step_is_predicted_as_it_was(write):
    once, compared = calibrate(HARDWARE, [write("once.json", step())])
    # The step's inputs are made during the step before.
    assert compared.measured["step"] == pytest.approx(0.10)
    assert compared.calibrated["step"] == pytest.approx(0.10, rel=1e-6)
    assert compared.assumed["step"] < 0.05
    assert set(once.measured) == {"matmul", "stream", "attention"}
    # Values that were not measured stay as they were.
    assert once.node_bandwidth == HARDWARE.node_bandwidth
    # Twice the time is half of the efficiency.
    twice, _ = calibrate(HARDWARE, [write("twice.json", step(2.0))])
    assert twice.matmul == pytest.approx(once.matmul / 2, rel=1e-3)
    assert twice.attention == pytest.approx([rate / 2 for rate in once.attention], rel=1e-3)
    # Results of the attention's benchmark take precedence over those of a step.
    both, compared = calibrate(HARDWARE, [write("once.json", step()), write("attention.json", *ATTENTION)])
    assert both.attention == (4.2e14, 3.0e14)
    assert compared.calibrated["step"] == pytest.approx(0.10, rel=1e-6)
    assert both.matmul < once.matmul
    with pytest.raises(ValueError, match=r"took 0\.001 s"):
        calibrate(HARDWARE, [write("quick.json", step(0.01))])


def test_attention_alone(write):
    found, compared = calibrate(HARDWARE, [write("attention.json", *ATTENTION)])
    assert (found.attention, found.measured, found.matmul) == ((4.2e14, 3.0e14), ("attention",), HARDWARE.matmul)
    assert compared is None


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([step(hardware="Intel(R) Xeon(R) Processor @ 2.10GHz")], "was measured on 'Intel.*and the plan is for"),
        ([STEP | {"rows": [{"objective": "ar", "seconds": {}}]}], "no step of objective bd3"),
        (ATTENTION[:4], "no step of objective bd3, nor attention forward and backward"),
        ([step(shape={"seq_len": 8})], "do not say what ran"),
        ([[1]], "holds no results"),
        ([], "holds no results"),
    ],
)
def test_what_is_refused(write, objects, message):
    with pytest.raises(ValueError, match=message):
        calibrate(HARDWARE, [write("results.json", *objects)])
