"""Log a run to Weights & Biases."""

from __future__ import annotations

import html
import logging
import netrc
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast
from urllib.parse import urlsplit

from bd3_scale.observe.loggers.base import LoggedRun, Logger, Value
from bd3_scale.recipe.running import WandbRecipe
from bd3_scale.registry import loggers
from bd3_scale.resilience.files import write_atomically
from bd3_scale.resilience.readers import read_regular

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]
# wandb names files and addresses by the id.
_ID = re.compile(r"([A-Za-z0-9_-]{1,64})\s*")
_LOG = logging.getLogger(__name__)


@loggers.register("wandb")
class WandbLogger(Logger):
    """Weights & Biases, by `logging.wandb` of the recipe.

    The id of the run is kept in `RUN/wandb_id`, so that a resumed run stays one run. Offline, which `auto` means
    without a key, it writes to `RUN/wandb` for `wandb sync`.
    """

    _run: wandb.Run | None = None

    def start(self, run: LoggedRun) -> None:
        recipe = WandbRecipe.model_validate(run.config["logging"]["wandb"])
        if (mode := _mode(recipe.mode)) == "disabled":
            return
        import wandb

        self._run = wandb.init(
            mode=mode,
            project=recipe.project,
            entity=recipe.entity,
            name=run.name,
            id=_run_id(run.folder / "wandb_id"),
            resume="allow" if mode == "online" else None,
            dir=run.folder,
            config=dict(run.config),
            # The progress bar owns the console, and a network that is down must not hold up a finished job.
            settings=wandb.Settings(console="off", quiet=True, silent=mode == "offline", finish_timeout=60),
        )
        # wandb's own counter refuses to go back, and a resumed run takes steps again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        if self._run is not None:
            self._run.log({"step": step, **values})

    def log_text(self, step: int, name: str, text: str) -> None:
        if self._run is not None:
            import wandb

            # As preformatted HTML: a string would be a metric without a chart.
            self._run.log({"step": step, name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)})

    def finish(self, *, failed: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(failed))


def _mode(mode: Literal["auto"] | Mode) -> Mode:
    """Return the mode, with `auto` decided: $WANDB_MODE, else online where there is a key."""
    if mode != "auto":
        return mode
    return cast(Mode, os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline"))


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):  # missing, or not one that wandb could read either
        return False


def _run_id(path: Path) -> str:
    """Return the id that the file holds; draw a new one where there is none, or what is there cannot be an id."""
    with suppress(FileNotFoundError, ValueError):
        if match := _ID.fullmatch(read_regular(path, 1 << 10).decode()):
            return match[1]
    if os.path.lexists(path):
        _LOG.warning("%s holds no id of a run of Weights & Biases, and a new one is drawn", path)
    new = secrets.token_hex(8)
    write_atomically(path, new)
    return new
