"""Text that loses its masks, live in the terminal."""

from __future__ import annotations

from types import TracebackType

from rich.live import Live

from bd3_scale.observe.console import Console, styled
from bd3_scale.resilience.terminal import clean

MASK = "[MASK]"
HIDDEN = "░"


class DenoisingView:
    """Shows the end of the text that changed last. A context manager; nothing where it is not `shown`."""

    def __init__(self, shown: bool) -> None:
        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True) if shown else None

    def __enter__(self) -> DenoisingView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, number: int, text: str) -> None:
        """What text `number` looks like, with `[MASK]` for each masked token."""
        if self._live is None:
            return
        console = self._live.console
        end = clean(text.replace(MASK, HIDDEN))[-console.width * max(1, console.height - 2) :]
        self._live.update(styled(*((letter, "dim" if letter == HIDDEN else "") for letter in end)), refresh=True)
