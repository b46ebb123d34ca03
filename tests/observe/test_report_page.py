"""Check the page of a report in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from bd3_scale.launch.run_report import write_report
from tests.observe.run_folders import make_run, train_record, write_lines

PHONE, DESK = (375, 740), (1100, 760)
# An end tag may contain a space, and the page's own placeholders are recognised by name.
HOSTILE = (
    '</script ><script>window.hit = 1</script><!--<img src=x onerror="window.hit = 1">@DATA@\x1b[31m\u202e & <b>b</b>'
)
Open = Callable[..., Page]


@pytest.fixture
def open_report(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Open the report of runs; at the end check that the browser had no errors and requested nothing from elsewhere."""
    pages, complaints, requests = [], [], []

    def opened(*folders: Path, size: tuple[int, int] = DESK, **options: Any) -> Page:
        file = tmp_path / "report.html"
        write_report(folders, file)
        page = browser.new_page(viewport={"width": size[0], "height": size[1]}, **options)
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        pages.append(page)
        return page

    yield opened
    hits = [page.evaluate("window.hit") for page in pages]
    for page in pages:
        page.close()
    assert [url for url in requests if not url.startswith(("file://", "data:"))] == []
    assert complaints == []
    assert hits == [None] * len(pages)


def figures(page: Page) -> dict[str, Locator]:
    names = page.locator(".figure").evaluate_all("each => each.map((figure) => figure.id.replace('figure-', ''))")
    return {name: page.locator(f'[id="figure-{name}"]') for name in names}


def scrolls_sideways(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")


def curve(page: Page, figure: str) -> str:
    return page.locator(f"#figure-{figure} path.curve").first.get_attribute("d") or ""


def test_each_figure_is_visible_also_on_a_phone(open_report: Open, tmp_path: Path) -> None:
    page = open_report(make_run(tmp_path / "run"))
    shown = figures(page)
    expected = {"loss", "nelbo", "loss_parts", "intervals", "variance", "throughput", "mfu", "step_parts", "memory"}
    assert shown.keys() == expected | {"lr", "grad_norm", "experts", "dead_experts", "saves", "timeline"}
    for width in (DESK, PHONE):
        page.set_viewport_size({"width": width[0], "height": width[1]})
        for name, figure in shown.items():
            box = figure.locator("svg").bounding_box()
            assert box is not None, name
            assert box["width"] > 200, name
            assert box["height"] > 100, name
            assert box["x"] + box["width"] <= width[0], name
            drawn = figure.locator("svg path, svg rect[fill]").evaluate_all(
                "each => each.map((path) => path.getBBox().width)"
            )
            assert max(drawn) > 50, name
        assert not scrolls_sideways(page)
    expect(page.locator("#status dd").first).to_have_text("done")
    expect(page.locator("#figure-loss path.spike")).to_have_count(1)
    expect(page.locator("#rest")).to_contain_text(f"bd3-scale replay {tmp_path / 'run'} --step 33")
    expect(page.locator("pre").first).to_have_text("def f(x): return 100")
    expect(page.locator("#figure-timeline rect")).to_have_count(2)
    expect(page.get_by_role("table", name="Attempts")).to_contain_text("bd3-scale train recipes/tiny.yaml")


@pytest.mark.slow
def test_text_of_strangers_is_shown_and_never_run(open_report: Open, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", name=HOSTILE)
    write_lines(
        folder / "samples.jsonl", [{"step": 1, "kind": "sample", "prompt": HOSTILE, "text": HOSTILE, "nfe": HOSTILE}]
    )
    write_lines(folder / "events.jsonl", [{"step": 1, "kind": HOSTILE, "loss": HOSTILE, "changes": 3}])
    write_lines(folder / "metrics.jsonl", [train_record(1, **{HOSTILE: 1.0, f"train/loss_source_{HOSTILE}": 2.0})])
    page = open_report(folder)
    shown = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    expect(page.locator("h1")).to_have_text(shown)
    expect(page.locator("pre")).to_have_text(shown + shown)
    expect(page.locator("#figure-loss_parts .legend")).to_contain_text(f"source {shown}")
    assert page.locator("img, b").count() == 0
    for details in page.locator("details").all():
        details.evaluate("each => { each.open = true; }")
    assert not scrolls_sideways(page)


@pytest.mark.slow
def test_no_other_script_and_no_request_is_allowed(browser: Browser, tmp_path: Path) -> None:
    write_report([make_run(tmp_path / "run")], tmp_path / "report.html")
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto((tmp_path / "report.html").as_uri())
    page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "window.hit = 1";
      const image = document.createElement("img");
      image.src = "http://127.0.0.1:9/x.png";
      document.body.append(script, image);
    }""")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hit") is None
    assert [("script-src" in line, "img-src" in line) for line in said] == [(True, False), (False, True)]
    page.close()


@pytest.mark.slow
def test_several_runs_share_figures_and_differences_are_a_table(open_report: Open, tmp_path: Path) -> None:
    first = make_run(tmp_path / "one", name="first")
    second = make_run(tmp_path / "two", name="second", steps=60, **{"lr: 4.0e-3": "lr: 1.0e-3"})
    page = open_report(first, second, size=PHONE, color_scheme="dark")
    expect(page.locator("#figure-loss path.curve")).to_have_count(2)
    expect(page.locator("#figure-loss .legend button")).to_have_text(["first", "second"])
    expect(page.locator("#figure-nelbo .legend")).to_contain_text("second · blocks of 4")
    table = page.get_by_role("table", name="Differences of the recipes")
    expect(table).to_contain_text("optimizer.lr")
    expect(table).not_to_contain_text("optimizer.betas")
    assert not scrolls_sideways(page)


@pytest.mark.slow
def test_zoom_logarithm_and_legend(open_report: Open, tmp_path: Path) -> None:
    page = open_report(make_run(tmp_path / "run"))
    whole = curve(page, "loss"), curve(page, "lr")
    box = page.locator("#figure-loss svg").bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.3 * box["width"], middle)
    expect(page.locator("#figure-loss .tip")).to_contain_text("median")
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], middle, steps=4)
    page.mouse.up()
    zoomed = curve(page, "loss"), curve(page, "lr")
    assert zoomed[0] != whole[0]
    assert zoomed[1] != whole[1]  # all figures show the same range
    assert 20 < float(page.locator("#from").input_value()) < 35
    page.locator("#figure-loss svg").dblclick()
    assert (curve(page, "loss"), curve(page, "lr")) == whole

    page.locator("#from").fill("50")
    page.locator("#from").press("Enter")
    assert curve(page, "loss") != whole[0]
    page.locator("#whole").click()
    page.locator("#figure-loss .log").click()
    assert curve(page, "loss") != whole[0]
    page.locator("#figure-loss .log").click()
    page.locator("#axis").select_option("tokens")
    expect(page.locator("#to")).to_have_value(str(2048 * 100))
    assert curve(page, "loss") == whole[0]

    page.locator("#figure-loss .legend button").click()
    expect(page.locator("#figure-loss path.curve")).to_have_count(0)
    page.locator("#figure-lr summary").click()
    expect(page.locator("#figure-lr table")).to_contain_text("learning rate")
    assert page.locator("#figure-lr tbody tr").count() == 100


@pytest.mark.slow
def test_a_keyboard_reads_values_off_a_figure(open_report: Open, tmp_path: Path) -> None:
    page = open_report(make_run(tmp_path / "run"))
    label = page.locator("#figure-nelbo svg").get_attribute("aria-label")
    assert re.match(r"Held-out NELBO, nats per token\. held-out text: 5 at step 100; blocks of 4: 5\.5", label or "")
    page.locator("#figure-lr svg").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#figure-lr .tip")).to_contain_text("learning rate: 0.001")


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_hardly_begun_has_a_page(open_report: Open, tmp_path: Path, steps: int) -> None:
    folder = make_run(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", [train_record(step) for step in range(1, steps + 1)])
    page = open_report(folder)
    expect(page.locator("#figure-timeline svg")).to_be_visible()
    expect(page.locator("#figure-loss circle")).to_have_count(steps)
