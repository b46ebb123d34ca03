"""Replace assumptions about a GPU by what it reached in `tools/bench_step.py` and `tools/bench_attention.py`.

The time of a step is one number and determines one factor: the share of its peak and of its memory bandwidth that a
GPU's kernels reach. The rates of attention come from their own benchmark. Links are not measured.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bd3_scale.plan import timing
from bd3_scale.plan.forecast import trace_stages, with_gpu_precision
from bd3_scale.plan.hardware import Hardware
from bd3_scale.plan.trace import Trace
from bd3_scale.recipe.schema import Recipe
from bd3_scale.recipe.vocabulary import Vocabulary
from bd3_scale.resilience.readers import read_regular, reader

# Bisections of the range of the factor.
_ROUNDS = 50
_PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Comparison:
    """The seconds of a measured step by phase, and those predicted before and after calibration."""

    gpus: int
    measured: dict[str, float]
    assumed: dict[str, float]
    calibrated: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """The content of files of results: rates of attention, forward and backward, and a step."""

    attention: tuple[float, float] | None = None
    step: dict[str, Any] | None = None


def calibrate(hardware: Hardware, files: Sequence[Path], *, device: str = "cuda") -> tuple[Hardware, Comparison | None]:
    """Return the hardware with measured values, and a comparison with the measured step if the files have one.

    ValueError: the files hold no such results, they come from other hardware, or no efficiency explains them.
    """
    results = read_results(files, hardware)
    if results.attention is not None:
        hardware = _with(hardware, ("attention",), attention=results.attention)
    if results.step is None:
        return hardware, None
    return _fit(hardware, results.step, device=device, with_attention=results.attention is None)


@reader("results of a benchmark", path="files")
def read_results(files: Sequence[Path], hardware: Hardware) -> Measured:
    """Read the results for the hardware from the files. ValueError: see `calibrate`."""
    attention: list[dict[str, Any]] = []
    step = None
    for path in files:
        header, *rows = _objects(path)
        # The attention benchmark appends the version of CUDA to the name.
        if str(header["hardware"]).partition(", CUDA")[0] != hardware.device:
            raise ValueError(
                f"{path} was measured on {header['hardware']!r}, and the plan is for {hardware.device!r}: measure on "
                "that GPU, or give --gpu a file that describes the GPU it was measured on"
            )
        attention += rows
        for row in header.get("rows", ()):
            if row["objective"] == "bd3":
                seconds = {name: float(row["seconds"][name]) for name in (*_PHASES, "step")}
                step = {**header, "seconds": seconds | {"data": float(row["seconds"].get("data", 0.0))}}
    forward, backward = (_median_rate(attention, name) for name in ("forward", "backward"))
    rates = (forward, backward) if forward and backward else None
    if step is None and rates is None:
        raise ValueError(
            f"{', '.join(map(str, files))}: no step of objective bd3, nor attention forward and backward: give results "
            "of tools/bench_step.py --json or tools/bench_attention.py --device cuda --json"
        )
    return Measured(rates, step)


def _objects(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one a line; the first one names the hardware."""
    objects = [json.loads(line) for line in read_regular(path).decode().splitlines() if line.strip()]
    if not objects or not all(isinstance(each, dict) for each in objects) or "hardware" not in objects[0]:
        raise ValueError(f"{path} holds no results of tools/bench_step.py --json or tools/bench_attention.py --json")
    return objects


def _median_rate(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    rates = [float(row["rate"]) for row in rows if row.get("pass") == name]
    return statistics.median(rates) if rates else None


def _fit(hardware: Hardware, step: dict[str, Any], *, device: str, with_attention: bool) -> tuple[Hardware, Comparison]:
    recipe, vocabulary, gpus = _what_ran(step)
    stages = trace_stages(recipe, vocabulary, gpus, hardware, device=device)
    # Training makes the inputs of a step during the step before, so the benchmark's time for data does not count.
    measured = {name: step["seconds"][name] for name in _PHASES}
    measured["step"] = step["seconds"]["step"] - step["seconds"]["data"]

    def seconds(of: Hardware) -> float:
        return timing.step_time(recipe, stages, gpus, of).seconds

    names = ("matmul", "stream", *(("attention",) if with_attention else ()))
    most = 1 / max(hardware.matmul, hardware.stream)
    factor = _solve(lambda factor: seconds(_scaled(hardware, factor, names)), measured["step"], most)
    calibrated = _with(_scaled(hardware, factor, names), names)
    return calibrated, Comparison(
        gpus,
        measured,
        _predicted(recipe, stages, gpus, hardware),
        _predicted(recipe, stages, gpus, calibrated),
    )


def _solve(seconds: Callable[[float], float], wanted: float, most: float) -> float:
    """Return the factor of all efficiencies at which a step takes the measured time, by bisection."""
    low, high = 1e-3, most
    if not seconds(high) <= wanted <= seconds(low):
        raise ValueError(
            f"the measured step took {wanted:.3f} s, and a prediction at any share of the GPU's peak is between "
            f"{seconds(high):.3f} and {seconds(low):.3f} s: something other than its kernels sets the time, or it is "
            "another GPU"
        )
    for _ in range(_ROUNDS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if seconds(middle) > wanted else (low, middle)
    return high


def _what_ran(step: dict[str, Any]) -> tuple[Recipe, Vocabulary, int]:
    try:
        shape, gpus = step["shape"], int(step["processes"])
        recipe = Recipe.model_validate(
            {key: shape[key] for key in ("model", "diffusion", "train", "parallel")}
            | {"name": "measured", "data": {"path": "synthetic", "seq_len": shape["seq_len"]}}
            | {"deterministic": step["deterministic"]}
        )
        size = int(shape["vocabulary"])
    except (KeyError, TypeError, ValidationError) as error:
        raise ValueError(
            f"the results do not say what ran, as this version's tools/bench_step.py does: {error}"
        ) from None
    return with_gpu_precision(recipe), Vocabulary(size=size, eos_id=0, mask_id=size - 1), gpus


def _predicted(recipe: Recipe, stages: dict[int, Trace], gpus: int, hardware: Hardware) -> dict[str, float]:
    """Return the predicted seconds of the benchmark's phases; a pipeline's bubble belongs to none of them."""
    time = timing.step_time(recipe, stages, gpus, hardware)
    slowest = max((timing.Rank(trace, recipe, hardware) for trace in stages.values()), key=lambda rank: rank.inside)
    by_phase = dict.fromkeys(_PHASES, 0.0)
    for key, work in slowest.trace.work.items():
        phase = "optimizer" if key.phase == "update" else "forward" if key.direction == "forward" else "backward"
        by_phase[phase] += slowest.kernel_seconds(key, work)
    return {**by_phase, "step": time.seconds}


def _scaled(hardware: Hardware, factor: float, names: Sequence[str]) -> Hardware:
    values = {name: getattr(hardware, name) for name in names}
    return hardware.model_copy(
        update={
            name: tuple(factor * each for each in value) if isinstance(value, tuple) else min(1.0, factor * value)
            for name, value in values.items()
        }
    )


def _with(hardware: Hardware, names: Sequence[str], **values: Any) -> Hardware:
    """Return the hardware with these values, marked as measured."""
    measured = tuple(dict.fromkeys([*hardware.measured, *names]))
    return hardware.model_copy(update={**values, "measured": measured})
