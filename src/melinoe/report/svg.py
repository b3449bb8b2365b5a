"""Figures as SVG inside a page: one style for all, no file beside the page, text that stays text."""

from __future__ import annotations

import io
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from melinoe.files import write_text


def use_matplotlib() -> None:
    """Sets the style; called once by whoever writes a page."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
         "figure.constrained_layout.use": True}
    )  # fmt: skip


def new_axes(width: float = 6.4, height: float = 3.4, columns: int = 1, **settings: Any) -> tuple[Any, Any]:
    """(figure, axes) of a size in inches."""
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(width, height), **settings)


def svg(figure: Any) -> str:
    """The figure as an element; the figure is closed."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def write_page(template: str, path: Path, **values: Any) -> None:
    """Fills a template of this folder and writes the page, complete or not at all."""
    page = jinja2.Template(
        files("melinoe.report").joinpath(template).read_text(encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    ).render(**values)
    write_text(path, page)
