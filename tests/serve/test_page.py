"""Check the page at `/` of a real server in a real browser."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from bd3_scale.registry import unmasking_rules
from tests.serve.servers import Server, served

pytestmark = pytest.mark.slow

KEY = "a-secret"
PHONE, DESK = (360, 740), (1100, 760)
HOSTILE = '<img src=x onerror="window.hit = 1"><script>window.hit = 1</script>&amp;\n\t  <b>b</b>'
# Records the masks and the text of the answer in each state, and where the parts of the page are.
RECORDER = """
window.states = [];
document.addEventListener("DOMContentLoaded", () => {
  const at = (id) => document.querySelector(id);
  const place = (id) => JSON.stringify(at(id).getBoundingClientRect());
  window.places = () => ["#write", "#form", "dl", "#box", "#state"].map(place);
  new MutationObserver(() => states.push({
    masks: document.querySelectorAll("#answer .mask").length, text: at("#answer").textContent, places: places(),
    fresh: [...document.querySelectorAll("#answer .fresh")].map((each) => each.textContent).join(""),
  })).observe(at("#answer"), { childList: true });
});
"""


@pytest.fixture(scope="module")
def server(chat_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(chat_checkpoint, "--name", "tiny", folder=tmp_path_factory.mktemp("page")) as started:
        yield started


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    yield from opened(browser, server)


def opened(browser: Browser, server: Server, *, refused: bool = False, **how: Any) -> Iterator[Page]:
    """Open the page; at the end check that it had no errors and requested nothing from elsewhere. `refused` allows the
    browser's message about a refused request."""
    width, height = how.pop("size", DESK)
    page = browser.new_page(viewport={"width": width, "height": height}, **how)
    page.set_default_timeout(20_000)
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.add_init_script(RECORDER)
    page.goto(f"{server.url}/")
    expect(page.locator("#write")).to_be_enabled()
    yield page
    page.close()
    assert [url for url in asked if not url.startswith((f"{server.url}/", "data:"))] == []
    assert [each for each in complaints if not (refused and each.startswith("Failed to load resource"))] == []


def post(server: Server, path: str, body: dict[str, Any]) -> str:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def fill(page: Page, **fields: Any) -> None:
    """Give fields values, also those in the folded part."""
    page.locator("details").evaluate("each => { each.open = true; }")
    for name, value in fields.items():
        field = page.locator(f"#{name}")
        if name in ("unmasking", "pace"):
            field.select_option(str(value))
        else:
            field.fill(str(value))


def write(page: Page) -> str:
    """Write a text, and return what the page shows at its end."""
    page.locator("#write").click()
    expect(page.locator("#state")).to_contain_text("The text is whole", timeout=30_000)
    return page.locator("#answer").text_content() or ""


def stream(page: Page, *events: dict[str, Any]) -> None:
    """Let the server stream these events."""

    def answer(route: Route) -> None:
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        route.fulfill(content_type="text/event-stream", body=body)

    page.route("**/denoise", answer)


def look(*parts: str | int, stopped_by: str | None = None) -> dict[str, Any]:
    return {"choice": 0, "parts": parts, "passes": 2, "tokens": 4, "stopped_by": stopped_by, "seconds": 0.5}


def test_a_text_settles_pass_by_pass(page: Page, server: Server) -> None:
    body = {"model": "tiny", "prompt": "def\n\n\n\n  x", "max_tokens": 14, "temperature": 0.8, "top_p": 0.95, "seed": 5,
            "unmasking": "static", "steps": 3}  # fmt: skip
    events = [json.loads(line[6:]) for line in post(server, "/denoise", body).splitlines() if line]
    assert max(len(event["parts"]) for event in events) > 2  # masks between text
    answer = json.loads(post(server, "/v1/completions", body))

    fill(page, **{name: value for name, value in body.items() if name not in ("model", "steps")}, pace=60)
    fill(page, steps=3)
    places = page.evaluate("places()")
    page.locator("#prompt").press("Control+Enter")
    expect(page.locator("#write")).to_have_text("Stop")
    expect(page.locator("#state")).to_have_text("The text is whole: it has as many tokens as were asked for.")
    expect(page.locator("#write")).to_have_text("Write")
    assert page.locator("#before").text_content() == body["prompt"]
    assert page.locator("#answer").text_content() == answer["choices"][0]["text"]

    def state(parts: list[str | int]) -> tuple[int, str]:
        return sum(part for part in parts if isinstance(part, int)), "".join(p for p in parts if isinstance(p, str))

    states = page.evaluate("states")
    shown = [(each["masks"], each["text"]) for each in states]
    assert [each for each, _ in groupby(shown)] == [each for each, _ in groupby(state(e["parts"]) for e in events)]
    assert all(each["places"] == places for each in states)  # nothing moves

    usage = answer["usage"]
    tokens, passes = usage["completion_tokens"], usage["denoising_passes"]
    counts = [page.locator(f"#{name}").text_content() for name in ("tokens", "passes", "ratio", "used-seed")]
    assert counts == [str(tokens), str(passes), f"{tokens / passes:.2f}", "5"]


def test_what_has_settled_now_is_marked_for_a_while(page: Page) -> None:
    stream(page, look("ab", 2), look("ab", 1, "d"), look("abcd", 4), look("abcd", 2, "ab"), look("abcdxyab"),
           look("abcdxyab", stopped_by="eos"))  # fmt: skip
    fill(page, pace=300)
    assert write(page) == "abcdxyab"
    fresh = [each["fresh"] for each in page.evaluate("states")]
    assert [each.endswith(new) for each, new in zip(fresh, ("ab", "d", "", "ab", "xyab"), strict=False)] == [True] * 5
    assert "c" in fresh[2]
    assert "d" not in fresh[4]  # its block came at least 900 ms before
    assert not fresh[3].startswith("ab")
    expect(page.locator("#answer .fresh")).to_have_count(0)
    expect(page.locator("#state")).to_have_text("The text is whole: the model ended it.")


def test_a_gap_is_filled_before_its_suffix(page: Page, server: Server) -> None:
    body = {"model": "tiny", "prompt": "one\n", "suffix": "\n\tthree", "max_tokens": 9, "temperature": 1, "seed": 2}
    fill(page, **{name: value for name, value in body.items() if name != "model"})
    text = write(page)
    assert text == json.loads(post(server, "/v1/completions", body))["choices"][0]["text"]
    assert page.locator("#text").evaluate("each => each.textContent") == f"one\nModel{text}\n\tthree"
    expect(page.locator("#who")).to_be_hidden()
    assert page.locator("#text").evaluate("each => getComputedStyle(each).whiteSpaceCollapse") == "preserve"


def test_text_is_never_markup(page: Page) -> None:
    elements = "document.querySelectorAll('img, b, script').length"
    before = page.evaluate(elements)
    fill(page, prompt=HOSTILE, suffix=HOSTILE, max_tokens=3)
    write(page)
    assert page.locator("#before").text_content() == page.locator("#after").text_content() == HOSTILE
    stream(page, look(HOSTILE, 3), look(HOSTILE, stopped_by="length"))
    assert write(page) == HOSTILE
    stream(page, {"error": {"message": HOSTILE}})
    page.locator("#write").click()
    expect(page.get_by_role("alert")).to_be_visible()
    assert page.get_by_role("alert").text_content() == HOSTILE
    assert page.evaluate(elements) == before
    assert page.evaluate("window.hit") is None


def test_no_script_runs_but_the_pages_own(browser: Browser, server: Server) -> None:
    page = browser.new_page()
    page.goto(f"{server.url}/")
    page.evaluate("text => { document.body.innerHTML = text; }", HOSTILE)
    page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.hit = 2";
        document.body.append(script);
    }""")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hit") is None
    page.close()


def test_stop_ends_the_request(page: Page, server: Server) -> None:
    passes = server.meter("denoising_passes_total")
    fill(page, max_tokens=2000, suffix="end")  # a gap is filled completely, whatever the tokens are
    page.locator("#write").click()
    expect(page.locator("#answer .mask").first).to_be_attached()
    server.wait_for("active_texts", 1)
    page.locator("#write").click()
    expect(page.locator("#state")).to_have_text("Stopped.")
    expect(page.locator("#write")).to_have_text("Write")
    server.wait_for("active_texts", 0)
    assert server.meter("denoising_passes_total") - passes < 2000  # as many as the text has tokens
    assert "end" in (page.locator("#text").text_content() or "")
    fill(page, max_tokens=5)
    write(page)


def test_a_chat_goes_on(page: Page, server: Server) -> None:
    page.get_by_label("Chat", exact=True).check()
    expect(page.locator("#suffix-row")).to_be_hidden()
    said: list[dict[str, str]] = []
    for seed, message in enumerate(["Who?\n", HOSTILE]):
        fill(page, max_tokens=10, seed=seed)
        page.get_by_label("Message").fill(message)
        text = write(page)
        said.append({"role": "user", "content": message})
        shown = [f"{'You' if each['role'] == 'user' else 'Model'}{each['content']}" for each in said]
        assert page.locator("#before .turn").all_text_contents() == shown
        body = {"model": "tiny", "messages": said, "max_tokens": 10, "temperature": 0.7, "seed": seed}
        assert text == json.loads(post(server, "/v1/chat/completions", body))["choices"][0]["message"]["content"]
        said.append({"role": "assistant", "content": text})
        expect(page.get_by_label("Message")).to_have_value("")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#before .turn")).to_have_count(0)
    page.get_by_label("Message").fill("Anew")
    write(page)
    expect(page.locator("#before .turn")).to_have_count(1)


def test_a_rule_has_the_fields_that_it_takes(page: Page) -> None:
    offered = page.locator("#unmasking option").all_text_contents()
    assert offered == list(unmasking_rules.names())
    expect(page.locator("#unmasking")).to_have_value("first-hitting")  # the server's rule, as the request sets none
    for name in offered:
        fill(page, unmasking=name)
        rule = unmasking_rules.get(name)
        assert page.locator("#steps").is_visible() == rule.takes_steps
        assert page.locator("#threshold").is_visible() == (rule.takes_threshold is not None)
    fill(page, unmasking="dynamic", steps=2, threshold=0.5)
    fill(page, unmasking="first-hitting", max_tokens=3)
    write(page)  # without hidden fields, which the server would refuse


def test_a_key_is_asked_for_where_the_server_wants_one(chat_checkpoint: Path, browser: Browser, tmp_path: Path) -> None:
    with served(chat_checkpoint, folder=tmp_path, BD3_SCALE_API_KEY=KEY) as server:
        for page in opened(browser, server, refused=True):
            expect(page.get_by_label("API key")).to_be_visible()
            expect(page.get_by_role("alert")).to_contain_text("the API key is missing")
            for wrong in ("wrong", "日本"):
                page.get_by_label("API key").fill(wrong)
                page.locator("#write").click()
                expect(page.get_by_role("alert")).to_contain_text("API key" if wrong == "wrong" else "cannot be asked")
                expect(page.get_by_label("API key")).to_be_visible()
            page.get_by_label("API key").fill(KEY)
            fill(page, max_tokens=3)
            write(page)
            expect(page.get_by_label("API key")).to_be_hidden()
            page.reload()
            fill(page, max_tokens=3)
            write(page)
            expect(page.get_by_label("API key")).to_be_hidden()


def test_what_is_wrong_is_said_in_words(browser: Browser, server: Server) -> None:
    for page in opened(browser, server, refused=True):
        alert = page.get_by_role("alert")
        for fields, words in (
            ({"max_tokens": 99_999}, "a text may have 2,048 new tokens"),
            ({"max_tokens": 0}, "Tokens at the most: "),
            ({"max_tokens": "", "top_p": 0}, "top_p"),  # not a probability
        ):
            fill(page, **fields)
            page.locator("#write").click()
            expect(alert).to_contain_text(words)
            expect(page.locator("#write")).to_have_text("Write")
        fill(page, top_p="", max_tokens=3)
        stream(page, look("ab", 2))
        page.locator("#write").click()
        expect(alert).to_have_text("The server ended the answer before its text was whole.")
        assert page.locator("#answer").text_content() == "ab"  # the earlier text stays
        page.unroute("**/denoise")
        page.route("**/denoise", lambda route: route.abort())
        page.locator("#write").click()
        expect(alert).to_contain_text("Is it still running?")
        page.unroute("**/denoise")
        write(page)
        expect(alert).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_a_phone(scheme: str, browser: Browser, server: Server) -> None:
    for page in opened(browser, server, size=PHONE, color_scheme=scheme):
        fill(page, prompt="x" * 300, suffix="y" * 300, max_tokens=40, unmasking="dynamic")
        write(page)
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
        box = page.locator("#box")
        assert box.evaluate("each => each.scrollWidth <= each.clientWidth")
        # WCAG 2.2, 1.4.3: 4.5 to 1
        for selector in ("h1", "#about", "label", "#prompt", "#write", "#box", ".given", "dt", "dd", "#state"):
            assert contrast(page, selector) >= 4.5, selector


def contrast(page: Page, selector: str) -> float:
    """Return the contrast of an element's text with its background, by WCAG."""
    colours = page.locator(selector).first.evaluate("""each => {
        let behind = each;
        while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        return [getComputedStyle(each).color, getComputedStyle(behind).backgroundColor].map((c) => c.match(/\\d+/g));
    }""")

    def luminance(channels: list[str]) -> float:
        parts = [int(channel) / 255 for channel in channels]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


def test_every_field_has_a_name_that_is_read_out(page: Page) -> None:
    nameless = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea')].filter((e) => !e.labels[0]?.textContent.trim())"
        ".map((e) => e.id)"
    )
    assert nameless == []
    facts = page.locator("#about").text_content()
    assert (page.locator("#model").text_content(), facts) == ("tiny", "Blocks of 4 tokens · context of 128 tokens")
