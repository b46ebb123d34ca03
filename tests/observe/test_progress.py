"""Check what a terminal and a log file are shown."""

from __future__ import annotations

import io
import re

from rich.console import Console

from bd3_scale.observe.progress import TrainingProgress


def train(console: Console, every_seconds: float) -> None:
    with TrainingProgress(20, first_step=10, every_seconds=every_seconds, console=console) as progress:
        for step in range(11, 21):
            progress.step(step, train_loss=5 - step / 10, tokens_per_second=12345.6)
            if step == 15:
                progress.evaluated(3.25)
                progress.message("checkpoint [15] saved")


def test_a_log_file_gets_the_first_and_last_line_and_messages() -> None:
    out = io.StringIO()
    train(Console(file=out, width=40), every_seconds=3600)
    lines = out.getvalue().splitlines()
    assert re.fullmatch(r"step 11/20  loss 3\.9000  12,346 tokens/s  ETA \d:\d\d:\d\d", lines[0])
    assert lines[1] == "checkpoint [15] saved"
    assert lines[2] == "step 20/20  loss 3.0000  NELBO 3.2500  12,346 tokens/s  ETA 0:00:00"
    assert len(lines) == 3


def test_a_log_file_gets_a_line_whenever_the_interval_is_over() -> None:
    out = io.StringIO()
    train(Console(file=out), every_seconds=0)
    assert len(out.getvalue().splitlines()) == 11


def test_a_terminal_gets_a_bar_with_every_number() -> None:
    out = io.StringIO()
    train(Console(file=out, force_terminal=True, width=120), every_seconds=0)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).splitlines()[-1]
    for piece in ("20/20", "━", "loss 3.0000", "NELBO 3.2500", "12,346 tokens/s", "ETA 0:00:00"):
        assert piece in last
    assert "checkpoint [15] saved" in out.getvalue()
