"""Renew docs/pictures/serve.png: the server's page in Chromium, in the middle of a text by the quickstart's model.

Run it by hand after `make quickstart`: `python -m tools.picture_serve`. It needs /usr/bin/chromium. The text is the
same each time; the pass in the picture varies a little.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from tests.serve.servers import served

RUN, PICTURE = Path("runs/quickstart"), Path("docs/pictures/serve.png")
FIELDS = {"prompt": "class Parser:\n", "max_tokens": "120", "temperature": "0.5", "threshold": "0.6", "seed": "4"}
PASSES = re.compile(r"[3-6]\d")  # after which the picture is taken


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        served(RUN, "--unmasking", "dynamic", folder=Path(folder)) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1040, "height": 620})
        page.goto(server.url)
        expect(page.locator("#write")).to_be_enabled()
        page.locator("details").evaluate("each => { each.open = true; }")
        for name, value in FIELDS.items():
            page.locator(f"#{name}").fill(value)
        page.locator("#pace").select_option(label="very slowly")
        page.locator("details").evaluate("each => { each.open = false; }")
        page.evaluate("scrollTo(0, 0)")
        page.locator("#write").click()
        expect(page.locator("#passes")).to_have_text(PASSES, timeout=60_000)
        # Text behind masks.
        page.locator("#answer .block[aria-hidden] ~ .fresh.block").first.wait_for(timeout=20_000)
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main()
