"""Renew docs/pictures/report.png and docs/pictures/watch.svg: what the quickstart's run shows.

By hand: `python -m tools.picture_report [RUN]`, after a quickstart with more evaluations, and with texts:
`bd3-scale train recipes/quickstart.yaml evaluation.every_steps=120 'evaluation.prompts=["def ", "class Parser:"]'`,
stopped once by SIGTERM and started again. The page needs /usr/bin/chromium.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from bd3_scale.launch.run_report import write_report
from bd3_scale.observe.console import Console
from bd3_scale.observe.follow import RunFollower
from bd3_scale.observe.watch import dashboard

RUN, PICTURES = Path("runs/quickstart"), Path("docs/pictures")


def main(run: Path) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    draw_page(run, PICTURES / "report.png")
    draw_screen(run, PICTURES / "watch.svg")


def draw_page(run: Path, picture: Path) -> None:
    """Write the first screens of a run's report in Chromium as a PNG."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder, "report.html")
        write_report([run], page_file)
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1040, "height": 1120}, color_scheme="light")
        page.goto(page_file.as_uri())
        page.locator("#figure-loss svg").hover()
        page.screenshot(path=picture)
        browser.close()


def draw_screen(run: Path, picture: Path) -> None:
    """Write the screen of `bd3-scale watch` as an SVG."""
    console = Console(width=120, height=32, record=True, file=io.StringIO())
    console.print(dashboard(RunFollower(run).refresh()[0], console))
    svg = console.export_svg(title=f"bd3-scale watch {run}")
    # rich names fonts that a reader's browser would load from a stranger's server.
    picture.write_text(re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RUN)
