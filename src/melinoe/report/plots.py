"""Figures with axes as SVG without a library: curves, points with names, training.

As in `shapes`: colours are the page's own variables, figures are drawn for a narrow column, each says in
words what it shows, and none needs a script. Names of curves stand below a figure as text that wraps; names
of points are placed where nothing stands yet, so that no two ever lie over each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from melinoe.report.shapes import COLOURS, WIDTH, drawn, words

TALL = 7.5, 6.9  # pixels above and below the middle of a line of text, with some air
LONGEST = 30  # characters of a name in a figure; the whole name is its title, and stands in the tables
DIRECTIONS = [math.radians(angle) for angle in (0, 180, 270, 90, 315, 45, 225, 135, 340, 20, 200, 160)]

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Curve:
    """A line through points. `raw`: values at the same x that stand faintly behind it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = ""
    dashed: bool = False
    raw: Sequence[float] = ()


@dataclass(frozen=True)
class Point:
    """A point with its name. x_range, y_range: an interval; others: faint points that belong to it.

    Points of one curve are joined; colours are fewer than curves may be.
    """

    name: str
    x: float
    y: float
    colour: str
    curve: str = ""
    mark: str = "dot"  # or ring, square
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    others: tuple[tuple[float, float], ...] = ()


def width_of(said: str) -> float:
    """Pixels of a line of text, at most, in the widest of the fonts that pages come in."""

    def width(letter: str) -> float:
        if letter in "MWmw@%" or ord(letter) > 0x2000:
            return 11.5
        return 8.2 if letter.isupper() else 6.9

    return sum(map(width, said))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high: steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * times for times in (1, 2, 5, 10) if span / (power * times) <= about)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axes:
    """Where values stand in a figure, and the body that is drawn so far."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], width: float, height: float) -> None:
        self.x, self.y, self.width = x, y, width
        self.left, self.right, self.top, self.bottom = 44.0, width - 12.0, 8.0, height
        self.body = ""

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x, self.y
        across = self.left + (x - x0) / ((x1 - x0) or 1.0) * (self.right - self.left)
        share = min(max((y - y0) / ((y1 - y0) or 1.0), 0.0), 1.0)  # what is higher is cut off at the top
        return across, self.bottom - share * (self.bottom - self.top)

    def scales(self, xs: Iterable[float], ys: Iterable[float], x_form: str, y_form: str, label: str) -> None:
        for y in ys:
            _, down = self.at(self.x[0], y)
            self.body += f'<path class="grid" d="M{self.left:.1f} {down:.1f}H{self.right:.1f}"/>'
            self.body += words(self.left - 5, down + 4, y_form.format(y), "end")
        for x in xs:
            across, _ = self.at(x, self.y[0])
            anchor = "end" if across > self.right - 10 else "middle"
            self.body += words(min(across, self.width - 2), self.bottom + 16, x_form.format(x), anchor)
        self.body += words((self.left + self.right) / 2, self.bottom + 33, label, "middle")

    def line(self, x: Sequence[float], y: Sequence[float], style: str) -> None:
        points = " ".join("{:.1f},{:.1f}".format(*self.at(a, b)) for a, b in zip(x, y, strict=True))
        self.body += f'<polyline points="{points}" fill="none" {style}/>'

    def figure(self, label: str) -> Markup:
        return drawn(self.body, self.bottom + 40, label, self.width)


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a window of a fifth of the curve, which its ends cut off."""
    half = max(1, len(values) // 10)
    windows = [values[max(0, middle - half) : middle + half + 1] for middle in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def curves(
    lines: Sequence[Curve],
    x_label: str,
    label: str,
    *,
    mark: float | None = None,
    rule: float | None = None,
    top: float | None = 1.0,
    y_form: str = "{:.0%}",
    at_points: bool = True,
) -> Markup:
    """Curves over one x.

    Args:
        mark, rule: an x and a y that a line stands at.
        top: the largest y; None: of the values, not of the raw ones behind them, which are cut off there.
        at_points: whether the x of the points are few and are its scale.
    """
    xs = sorted({x for one in lines for x in one.x})
    highest = top or 1.15 * max([y for one in lines for y in one.y] + [rule or 0.0]) or 1.0
    axes = _Axes((xs[0], xs[-1]), (0.0, highest), WIDTH, 150)
    axes.scales(xs if at_points else ticks(xs[0], xs[-1]), ticks(0.0, highest, 4), "{:g}", y_form, x_label)
    if mark is not None and xs[0] <= mark <= xs[-1]:
        axes.line((mark, mark), (0.0, highest), 'class="mark"')
    if rule is not None:
        axes.line((xs[0], xs[-1]), (rule, rule), 'class="mark"')
    legend = Markup("")
    for number, one in enumerate(lines):
        colour, dash = one.colour or COLOURS[number % len(COLOURS)], ' stroke-dasharray="4 3"' * one.dashed
        if one.raw:
            axes.line(one.x, one.raw, f'stroke="var({colour})" stroke-width="1" stroke-opacity="0.3"')
        axes.line(one.x, one.y, f'stroke="var({colour})" stroke-width="2"{dash}')
        for x, y in zip(one.x, one.y, strict=True) if at_points else ():  # there may be one alone
            across, down = axes.at(x, y)
            axes.body += f'<circle cx="{across:.1f}" cy="{down:.1f}" r="2.5" fill="var({colour})"/>'
        style = "dashed" if one.dashed else "solid"
        legend += Markup('<span><i class="stroke" style="border-top:2px {} var({})"></i>{}</span>').format(
            style, colour, one.name
        )
    return axes.figure(label) + Markup('<div class="legend">{}</div>').format(legend)


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def place(at: tuple[float, float], width: float, area: Box, taken: Sequence[Box]) -> Box | None:
    """The nearest box for a line of text beside a point that lies over nothing; None: there is no room."""
    above, below = TALL
    for distance in range(0, int(area[2] - area[0]), 3):
        for angle in DIRECTIONS:
            x = at[0] + math.cos(angle) * (width / 2 + 7 + distance)
            y = at[1] + math.sin(angle) * (12 + distance)
            box = (x - width / 2, y - above, x + width / 2, y + below)
            inside = area[0] <= box[0] and box[2] <= area[2] and area[1] <= box[1] and box[3] <= area[3]
            if inside and not any(_overlap(box, other) for other in taken):
                return box
    return None


def scatter(
    points: Sequence[Point],
    x_label: str,
    label: str,
    *,
    x: tuple[float, float],
    y: tuple[float, float],
    x_form: str,
    y_form: str,
    start: tuple[float, float] | None = None,
    x_guides: Sequence[tuple[float, str]] = (),
    y_guides: Sequence[tuple[float, str]] = (),
    width: int = WIDTH,
    height: int = 250,
) -> Markup:
    """Points with names beside them; those of one curve are joined, from `start` on, by a line.

    Args:
        x, y: what the axes span; points outside are left out.
        x_guides, y_guides: (value, words) of dashed lines.
    """
    axes = _Axes(x, y, width, height)
    axes.scales(ticks(*x, 5 if width <= WIDTH else 8), ticks(*y, 5), x_form, y_form, x_label)
    area = (axes.left + 2, axes.top - 6, axes.width - 1.0, axes.bottom - 1)
    taken: list[Box] = []
    shown = [one for one in points if x[0] <= one.x <= x[1] and y[0] <= one.y <= y[1]]
    for value, said in x_guides:
        across, _ = axes.at(value, y[0])
        axes.line((value, value), y, 'class="mark"')
        wide = width_of(said) + 4
        left = across if across + wide <= axes.right else across - wide
        axes.body += words(left + 3, axes.bottom - 5, said)
        taken.append((left, axes.bottom - 16, left + wide, axes.bottom))
    for value, said in y_guides:
        _, down = axes.at(x[0], value)
        axes.line(x, (value, value), 'class="mark"')
        wide = width_of(said)
        box = (axes.right - wide, down - 16, axes.right, down)
        near = (box[0] - 6, box[1] - 12, box[2] + 6, box[3] + 12)
        if any(_overlap(near, (x, y, x + 1, y + 1)) for x, y in (axes.at(one.x, one.y) for one in shown)):
            box = (axes.left + 4, box[1], axes.left + 4 + wide, box[3])  # points stand there
            axes.body += words(box[0], down - 4, said)
        else:
            axes.body += words(axes.right, down - 4, said, "end")
        taken.append(box)
    _join(axes, shown, start)
    for one in shown:
        taken += _point(axes, one)
    for one in sorted(shown, key=lambda one: (-one.x, one.y)):
        axes.body += _name(axes, one, area, taken)
    return axes.figure(label)


def _join(axes: _Axes, points: Sequence[Point], start: tuple[float, float] | None) -> None:
    for colour, curve in dict.fromkeys((one.colour, one.curve) for one in points if one.curve):
        line = sorted((one.x, one.y) for one in points if one.curve == curve)
        line = [start, *line] if start is not None else line
        axes.line([a for a, _ in line], [b for _, b in line], f'stroke="var({colour})" stroke-opacity="0.6"')


def _point(axes: _Axes, one: Point) -> list[Box]:
    """Draws a point, and returns where names must not stand."""
    x, y = axes.at(one.x, one.y)
    colour = f"var({one.colour})"
    boxes = [(x - 6, y - 6, x + 6, y + 6)]
    for a, b in one.others:
        if axes.x[0] <= a <= axes.x[1]:
            across, down = axes.at(a, b)
            axes.body += (
                f'<circle cx="{across:.1f}" cy="{down:.1f}" r="2.2" fill="{colour}" fill-opacity="0.4"/>'
            )
    if one.x_range:
        low, high = (axes.at(min(max(end, axes.x[0]), axes.x[1]), one.y)[0] for end in one.x_range)
        axes.body += f'<path d="M{low:.1f} {y:.1f}H{high:.1f}" stroke="{colour}"/>'
        boxes.append((low, y - 1, high, y + 1))
    if one.y_range:
        low, high = (axes.at(one.x, end)[1] for end in one.y_range)
        axes.body += f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>'
        boxes.append((x - 1, high, x + 1, low))
    if one.mark == "square":
        axes.body += f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
    else:
        fill = "var(--paper)" if one.mark == "ring" else colour
        axes.body += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}"/>'
    return boxes


def _name(axes: _Axes, one: Point, area: Box, taken: list[Box]) -> str:
    """The name beside its point, and a thin line to it where it had to go further away."""
    short = one.name if len(one.name) <= LONGEST else one.name[: LONGEST - 1] + "…"
    short = " ".join(short.split())
    at = axes.at(one.x, one.y)
    box = place(at, width_of(short), area, taken)
    if box is None:
        return ""
    taken.append(box)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    near = min(max(at[0], box[0]), box[2]), min(max(at[1], box[1]), box[3])
    lead = ""
    if math.dist(at, near) > 16:
        lead = f'<path class="lead" d="M{at[0]:.1f} {at[1]:.1f}L{near[0]:.1f} {near[1]:.1f}"/>'
    at_place = f'x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle"'
    said = f'<text class="label" {at_place} style="fill:var({one.colour})">'
    return f"{lead}{said}<title>{escape(one.name)}</title>{escape(short)}</text>"
