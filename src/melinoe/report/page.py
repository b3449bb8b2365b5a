"""A page of one file: a template of this folder over base.html, filled and written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from melinoe.files import write_text
from melinoe.outputs import Kind

_MARK = b'<meta name="generator" content="melinoe">'  # of base.html


def _foreign(path: Path) -> str:
    return "" if _MARK in path.read_bytes() else "a file that is not a page of melinoe"


PAGE = Kind("a page", False, _foreign)


def write_page(template: str, path: Path, **values: Any) -> None:
    """Fills a template of this folder.

    What stands in `values` is escaped, wherever it comes from; figures alone (`svg`) are markup already.
    """
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("melinoe", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    write_text(path, pages.get_template(template).render(**values))


def times(ratio: float, apart: bool) -> str:
    """A page's first number: how many times as fast; slower is said to be slower, and noise to be no gain."""
    if not apart:
        return "even"
    return f"{ratio:.1f}×" if ratio >= 1 else f"{1 / ratio:.1f}× slower"
