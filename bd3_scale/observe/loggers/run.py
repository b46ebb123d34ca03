"""Send the metrics and texts of a run to `metrics.jsonl` and to the loggers that its recipe names."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType

from bd3_scale.observe.loggers.base import LoggedRun, Logger, Value
from bd3_scale.observe.metrics import METRICS_FILE, truncate_after
from bd3_scale.recipe.running import LoggingRecipe
from bd3_scale.registry import loggers
from bd3_scale.resilience.files import Lines


def logger_names(recipe: LoggingRecipe) -> tuple[str, ...]:
    """Return the loggers that a recipe turns on, by their names in `registry.loggers`."""
    built_in = {"wandb": recipe.wandb.mode != "disabled", "tensorboard": recipe.tensorboard}
    return (*(name for name, on in built_in.items() if on), *recipe.loggers)


def check_loggers(recipe: LoggingRecipe) -> None:
    """Check that the loggers of a recipe can run here. ValueError: one cannot; the message says what helps."""
    for name in logger_names(recipe):
        if obstacle := loggers.get(name).obstacle():
            raise ValueError(f"logger {name}: {obstacle}")


class RunLoggers:
    """The loggers of a run, for one process of it. A context manager.

    Records that an earlier attempt wrote after the step that the run resumes from are dropped from `metrics.jsonl`, see
    `truncate_after`. `metrics.jsonl` is not optional: OSError, it cannot be written. A logger that fails is turned off
    with a warning.
    """

    def __init__(self, run: LoggedRun, recipe: LoggingRecipe) -> None:
        path = run.folder / METRICS_FILE
        truncate_after(path, run.after_step, evaluates_again=run.evaluates_again)
        self._file = Lines(path)
        self._loggers: dict[str, Logger] = {}
        for name in logger_names(recipe):
            self._loggers[name] = loggers.get(name)()
        self._each(lambda logger: logger.start(run))

    def __enter__(self) -> RunLoggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._each(lambda logger: logger.finish(failed=error is not None))

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Write the metrics of a step. In `metrics.jsonl` a number that is not finite becomes null, as JSON needs."""
        record = {"step": step} | {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps(record))
        self._each(lambda logger: logger.log(step, values))

    def log_text(self, step: int, name: str, text: str) -> None:
        """Write a text of a step to the loggers; `metrics.jsonl` holds numbers alone."""
        self._each(lambda logger: logger.log_text(step, name, text))

    def _each(self, action: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                action(logger)
            except Exception as error:  # noqa: BLE001 - libraries raise many types; none may end a training
                del self._loggers[name]
                warnings.warn(
                    f"the logger {name} failed and is off from here on, metrics.jsonl goes on: {error!r}", stacklevel=4
                )
