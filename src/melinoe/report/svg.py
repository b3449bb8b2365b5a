"""Figures as SVG inside a page: one style for all, no file beside the page, text that stays text."""

from __future__ import annotations

import io
from typing import Any

from markupsafe import Markup


def use_matplotlib() -> None:
    """Sets the style; called once by whoever writes a page.

    A name with a dollar in it is no formula: it would be drawn as one, or stop the drawing.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 10,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
         "figure.constrained_layout.use": True}
    )  # fmt: skip


def new_axes(width: float = 6.4, height: float = 3.4, columns: int = 1, **settings: Any) -> tuple[Any, Any]:
    """(figure, axes) of a size in inches."""
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(width, height), **settings)


def svg(figure: Any) -> Markup:
    """The figure as an element, its texts escaped; the figure is closed."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    plt.close(figure)
    text = buffer.getvalue().replace("#000000", "currentColor")  # the page's ink, light or dark
    return Markup(text[text.index("<svg") :])
