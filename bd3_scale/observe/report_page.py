"""Write the data of runs into the page of a report."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bd3_scale.observe.figures import FIGURES, other_figures

# The first bytes of every page: a file without them is no report.
PAGE_START = b"<!doctype html"
_PAGE = Path(__file__).with_name("report.html")


def report_page(runs: Sequence[Mapping[str, Any]], **more: Any) -> str:
    """Return one HTML page that needs no network, with the data of `runs` inside it.

    runs: as of `report_data.run_for_page`, with what `launch.run_report` adds; more: `made`, `version`, `differences`.
    """
    text = _PAGE.read_text(encoding="utf-8")
    ids = dict.fromkeys(name for run in runs for name in run["series"])
    figures = [figure for figure in (*FIGURES, *other_figures(ids)) if figure.id in ids]
    shown = [{name: getattr(figure, name) for name in ("id", "title", "unit", "points", "log")} for figure in figures]
    data = {"runs": list(runs), "figures": shown, **more}
    # The policy first: what it replaces stands before the data, which may hold anything.
    return text.replace("@POLICY@", _policy(text), 1).replace("@DATA@", json_for_html(data), 1)


def json_for_html(data: object) -> str:
    """Return JSON that a `script` element can hold: no text in it can end the element or begin a comment.

    Everything but ASCII is an escape, so that no half character keeps the page from being written either.
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _policy(text: str) -> str:
    """Return a Content-Security-Policy under which the page's own script alone runs, and nothing is loaded."""
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = ("default-src 'none'", f"script-src 'sha256-{digest}'", "style-src 'unsafe-inline'", "img-src data:")
    return "; ".join((*rules, "base-uri 'none'", "form-action 'none'"))
