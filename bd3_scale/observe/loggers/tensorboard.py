"""Log a run to event files of TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bd3_scale.observe.loggers.base import LoggedRun, Logger, Value
from bd3_scale.registry import loggers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


@loggers.register("tensorboard")
class TensorBoardLogger(Logger):
    """Event files in `RUN/tensorboard`, one for each attempt: `tensorboard --logdir RUN/tensorboard`."""

    _writer: SummaryWriter

    @classmethod
    def obstacle(cls) -> str | None:
        if importlib.util.find_spec("tensorboard") is None:
            return (
                "TensorBoard is not installed: pip install 'bd3_scale[tensorboard]', or set logging.tensorboard=false"
            )
        return None

    def start(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers drop what earlier files hold from this step on (SessionLog.START in tensorboard's event_accumulator).
        # An evaluation at `after_step` that is repeated stands there twice, with the same values.
        purge = run.after_step + 1 if run.after_step else None
        self._writer = SummaryWriter(str(run.folder / FOLDER), purge_step=purge)
        if not run.after_step:
            # An indented block is shown as it is.
            recipe = "\n".join(f"    {line}" for line in json.dumps(run.config, indent=2).splitlines())
            self.log_text(0, "recipe", recipe)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        for name, value in values.items():
            # TensorBoard draws no point for NaN or infinity, and its axes fail with some of them.
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, step)
        # A step before the checkpoint that a killed run resumes from is not logged again.
        self._writer.flush()

    def log_text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)
        self._writer.flush()

    def finish(self, *, failed: bool) -> None:
        self._writer.close()
