"""Figures of a page as HTML and SVG without a library.

Colours are the page's own variables, so that they follow dark mode; figures are drawn for a narrow column, so
that their texts are as large on a telephone as on a desk.

Every figure says in words what it shows (`role="img"` and a label), and none needs a script. Rows of bars are
HTML: a long name wraps, and never lies over another.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape

from melinoe.config import format_bytes

WIDTH = 380  # of a figure, in its own units, which are pixels in a narrow column
_MEMORY = {
    "interpreter and libraries": ("process_bytes", "library_bytes"),
    "resident weights": ("resident_bytes",),
    "KV cache and work space": ("cache_bytes", "work_bytes", "staging_bytes"),
    "experts": ("slot_bytes",),
}
COLOURS = ("--one", "--two", "--three", "--four", "--five", "--six", "--seven", "--eight")


def bars(rows: list[dict[str, Any]], label: str) -> Markup:
    """Horizontal bars on one scale.

    Args:
        rows: {"name", "value", "text", "colour" (of the page's variables); optional: "low", "high" (a range),
            "ceiling" (a mark), "note"}.
        label: what the figure shows, in words.
    """
    largest = max((row.get("high") or row["value"] for row in rows), default=1.0) * 1.04 or 1.0

    def share(value: float) -> str:
        return f"{100 * min(1.0, value / largest):.2f}%"

    parts = []
    for row in rows:
        marks = ""
        if row.get("high"):
            width = share(row["high"] - row["low"])
            marks += f'<i class="range" style="left:{share(row["low"])};width:{width}"></i>'
        if row.get("ceiling") and row["ceiling"] <= largest:
            marks += f'<i class="ceiling" style="left:{share(row["ceiling"])}"></i>'
        note = Markup('<span class="soft"> {}</span>').format(row["note"]) if row.get("note") else ""
        bar = Markup('<b style="width:{};background:var({})"></b>').format(share(row["value"]), row["colour"])
        parts.append(
            Markup('<div class="bar"><span>{}{}</span><div class="track">{}{}</div><em>{}</em></div>').format(
                row["name"], note, bar, Markup(marks), row["text"]
            )
        )
    return Markup('<div class="bars" role="img" aria-label="{}">{}</div>').format(
        label, Markup("").join(parts)
    )


def spans(rows: list[dict[str, Any]], label: str, low: float = 0.0, high: float = 1.0) -> Markup:
    """Two ends on one scale with a line between them, a row for each name.

    Args:
        rows: {"name", "ring", "dot" (values of the open and of the filled mark), "text", "colour"; optional:
            "ends" (of the line; else both marks)}.
    """

    def share(value: float) -> str:
        return f"{100 * min(1.0, max(0.0, (value - low) / ((high - low) or 1.0))):.2f}%"

    parts = []
    for row in rows:
        first, last = sorted(row.get("ends") or (row["ring"], row["dot"]))
        width = f"calc({share(last)} - {share(first)})"
        marks = Markup('<i class="span" style="left:{};width:{};background:var({})"></i>').format(
            share(first), width, row["colour"]
        )
        for kind in ("ring", "dot"):
            if row.get(kind) is not None:
                marks += Markup('<i class="{}" style="left:{};--mark:var({})"></i>').format(
                    kind, share(row[kind]), row["colour"]
                )
        parts.append(
            Markup(
                '<div class="bar"><span>{}</span><div class="track thin">{}</div><em>{}</em></div>'
            ).format(row["name"], marks, row["text"])
        )
    return Markup('<div class="bars" role="img" aria-label="{}">{}</div>').format(
        label, Markup("").join(parts)
    )


def drawn(body: str, height: float, label: str, width: float = WIDTH) -> Markup:
    """The body of a figure as an element that says in words what it shows."""
    return Markup(
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{body}</svg>"
    )


def words(x: float, y: float, said: object, anchor: str = "start") -> str:
    """A line of text in a figure."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def heat(rows: list[list[float]], label: str) -> Markup:
    """A map: a row of cells for each layer, sorted, darker where a value is larger; a scale for each row."""
    count = max(map(len, rows))
    cell, tall = (WIDTH - 30) / count, 14.0 if len(rows) <= 16 else 224 / len(rows)
    body = ""
    for layer, values in enumerate(rows):
        largest = max(values) or 1.0
        y = layer * tall
        if len(rows) <= 16 or layer % 8 == 0:
            body += words(24, y + min(tall, 11), layer, "end")
        body += "".join(
            f'<rect x="{30 + expert * cell:.1f}" y="{y:.1f}" width="{cell:.2f}" height="{tall - 1:.1f}" '
            f'fill="var(--one)" fill-opacity="{value / largest:.2f}"/>'
            for expert, value in enumerate(sorted(values, reverse=True))
        )
    return drawn(body, len(rows) * tall + 2, label)


def map_of(name: str, layers: list[list[float]]) -> dict[str, Any]:
    """A map of what decoding asks of each layer's experts: {"name", "figure", "share" (in words)}."""
    top = [sum(sorted(layer, reverse=True)[: max(1, len(layer) // 4)]) for layer in layers]
    share = f"{sum(top) / len(top):.0%}"
    said = f"{name}: a quarter of the experts of a layer serves {share} of its requests"
    return {"name": name, "figure": heat(layers, said), "share": share}


def timeline(steps: list[dict[str, float]]) -> Markup:
    """A column for each token: seconds computing, waiting for a read, and of reads behind computing."""
    shares = {name: sum(step[name] for step in steps) for name in steps[0]}
    said = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in shares.items())
    label = f"Seconds of each token after the first: {said}"
    left, bottom = 52, 120
    totals = sorted(step["computing"] + step["waiting"] for step in steps)
    # one token that the machine was busy in must not flatten all others: it is cut off at the top
    tallest = min(totals[-1], 3 * totals[len(totals) * 3 // 4]) or 1.0
    width = (WIDTH - left) / len(steps)
    top = f"{1000 * tallest:.0f} ms" if tallest < 1 else f"{tallest:.3g} s"
    body = words(left - 5, 12, top, "end") + words(left - 5, bottom, "0", "end")
    for number, step in enumerate(steps):
        x, y = left + number * width, float(bottom)
        for name, colour in (("computing", "--one"), ("waiting", "--two")):
            tall = min(step[name] / tallest * (bottom - 4), y)
            y -= tall
            body += (
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width - 1, 0.5):.2f}" height="{tall:.1f}" '
                f'fill="var({colour})"/>'
            )
        tall = min(step["hidden"] / tallest, 1.0) * (bottom - 4)
        body += (
            f'<rect x="{x:.1f}" y="{bottom - tall:.1f}" width="{max(width / 3, 0.5):.2f}" '
            f'height="{tall:.1f}" fill="var(--three)"/>'
        )
    body += words((left + WIDTH) / 2, bottom + 16, "tokens of one answer, one column each", "middle")
    names = {"--one": "computing", "--two": "waiting for a read", "--three": "reading, hidden"}
    for number, (colour, name) in enumerate(names.items()):
        x = 12 + number * 122
        body += f'<rect x="{x}" y="{bottom + 27}" width="10" height="10" fill="var({colour})"/>'
        body += words(x + 14, bottom + 36, name)
    return drawn(body, bottom + 44, label)


def stacked(parts: list[tuple[str, float, str]], label: str) -> Markup:
    """One bar of several parts, and its legend.

    Args:
        parts: (name, value, text).
    """
    total = sum(value for _, value, _ in parts) or 1.0
    bar, legend = Markup(""), Markup("")
    for number, (name, value, text) in enumerate(parts):
        colour = COLOURS[number % len(COLOURS)]
        bar += Markup('<b style="width:{}%;background:var({})"></b>').format(
            f"{100 * value / total:.2f}", colour
        )
        legend += Markup('<span><i style="background:var({})"></i>{} {}</span>').format(colour, name, text)
    return Markup(
        '<div role="img" aria-label="{}"><div class="stack">{}</div><div class="legend">{}</div></div>'
    ).format(label, bar, legend)


def memory(budget: dict[str, Any], limit: int | None) -> Markup | None:
    """Where the bytes of a plan go (`melinoe.runtime.budget.Budget`); None where there is no plan."""
    sums = {name: sum(budget.get(key, 0) for key in keys) for name, keys in _MEMORY.items()}
    rest = (limit or 0) - sum(sums.values())
    if rest > 0:
        sums["not used"] = rest
    parts = [(name, float(value), format_bytes(value)) for name, value in sums.items() if value]
    if not budget:
        return None
    return stacked(parts, "Memory: " + ", ".join(f"{name} {text}" for name, _, text in parts))
