"""Check event files with TensorBoard's own reader, and loggers that fail."""

from __future__ import annotations

import importlib.util
import math
import warnings
from pathlib import Path

import pytest

from bd3_scale.observe.loggers import Logger
from bd3_scale.observe.loggers.base import LoggedRun
from bd3_scale.observe.loggers.run import RunLoggers, check_loggers
from bd3_scale.observe.metrics import read_metrics
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.running import LoggingRecipe, WandbRecipe
from bd3_scale.recipe.schema import Recipe, RecipeError
from bd3_scale.registry import loggers
from tests.support.recipes import tiny_recipe

OFF = WandbRecipe(mode="disabled")


def opened(folder: Path, after_step: int = 0, **recipe: object) -> RunLoggers:
    run = LoggedRun(folder, "tiny", {"seed": 1}, after_step)
    return RunLoggers(run, LoggingRecipe.model_validate({"wandb": OFF, **recipe}))


def test_event_files_of_a_resumed_run_hold_every_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = opened(tmp_path, tensorboard=True)
    for step in range(1, 7):
        killed.log(step, {"train/loss": float(step), "perf/mfu": math.nan, "checkpoint/slowdown": None})
    killed.log_text(6, "samples/0", "Once upon")
    # The run was killed here: nothing was closed, and step 6 is lost, since the checkpoint is of step 4.
    with opened(tmp_path, 4, tensorboard=True) as resumed:
        for step in range(5, 8):
            resumed.log(step, {"train/loss": 10.0 * step})
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        *((step, float(step)) for step in range(1, 5)),
        *((step, 10.0 * step) for step in range(5, 8)),
    ]
    (recipe,) = events.Tensors("recipe/text_summary")
    assert b'"seed": 1' in recipe.tensor_proto.string_val[0]
    # Readers keep texts of steps that are repeated; the new text has the same step.
    assert [e.step for e in events.Tensors("samples/0/text_summary")] == [6]


@loggers.register("test_failing")
class Failing(Logger):
    """A logger that fails at the method that the class attribute names."""

    at = ""
    seen: list[str]

    def start(self, run: LoggedRun) -> None:
        type(self).seen = []
        self._note("start")

    def log(self, step: int, values: object) -> None:
        self._note("log")

    def finish(self, *, failed: bool) -> None:
        self._note("finish")

    def _note(self, method: str) -> None:
        self.seen.append(method)
        if method == self.at:
            raise RuntimeError(f"no network in {method}")


@pytest.mark.parametrize(
    ("at", "seen"),
    [("start", ["start"]), ("log", ["start", "log"]), ("finish", ["start", "log", "log", "finish"])],
)
def test_a_logger_that_fails_warns_once_and_the_others_go_on(tmp_path: Path, monkeypatch, at: str, seen: list) -> None:
    monkeypatch.setattr(Failing, "at", at)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with opened(tmp_path, loggers=["test_failing"]) as running:
            for step in (1, 2):
                running.log(step, {"train/loss": 1.0})
    assert [str(w.message) for w in caught] == [
        "the logger test_failing failed and is off from here on, metrics.jsonl goes on: "
        f"RuntimeError('no network in {at}')"
    ]
    assert Failing.seen == seen
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_missing_package_is_an_error_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with pytest.raises(ValueError, match=r"pip install 'bd3_scale\[tensorboard\]'"):
        check_loggers(LoggingRecipe(wandb=OFF, tensorboard=True))
    check_loggers(LoggingRecipe(wandb=OFF))


@pytest.mark.parametrize(
    ("name", "message"),
    [("no_such", "no logger is called 'no_such'"), ("tensorboard", "set logging.tensorboard")],
)
def test_a_recipe_names_loggers_of_plug_ins_alone(name: str, message: str) -> None:
    recipe = Recipe.model_validate(tiny_recipe(logging={"loggers": [name]}))
    with pytest.raises(RecipeError, match=message):
        check_recipe(recipe, 1)
