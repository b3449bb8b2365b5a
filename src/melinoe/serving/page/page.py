"""The page itself: one file, and headers that let it do nothing but speak to its own server."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files


def load() -> tuple[bytes, dict[str, str]]:
    """(the page, its headers). Only its own script and style run, known by their hashes."""
    text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(text, 'script')}",
            f"style-src {_hash(text, 'style')}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return text.encode(), headers


def _hash(text: str, tag: str) -> str:
    """Of the content of the only element of that name."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
