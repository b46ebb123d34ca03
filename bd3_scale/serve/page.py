"""Serve the page at `/`, which shows how a text loses its masks, under a strict content security policy."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

from fastapi.responses import HTMLResponse

_PAGE = Path(__file__).with_name("page.html")


@functools.cache
def page() -> HTMLResponse:
    """Return the page, with a policy that lets only its own script run, and only this server be contacted."""
    text = _PAGE.read_text(encoding="utf-8")
    script = text.partition("<script>")[2].partition("</script>")[0]
    policy = {
        "default-src": "'none'",
        "script-src": f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    header = "; ".join(f"{name} {value}" for name, value in policy.items())
    return HTMLResponse(text, headers={"Content-Security-Policy": header, "X-Content-Type-Options": "nosniff"})
