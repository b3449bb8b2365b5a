"""The figures of a sweep: the frontier, other budgets, and where the gain comes from."""

from __future__ import annotations

from typing import Any

from melinoe.frontier.table import LOSSES, entry_at, reference, rows_of
from melinoe.report.svg import new_axes, svg

# eight hues that the colour-blind tell apart (Okabe and Ito), darkest first
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f3c8d", "#444444")
GREY = "#6b7280"
NAME_HEIGHT = 0.19  # inches, of a name beside a line
NEAR = 1.08  # perplexity ratio up to which the second panel looks closer


def _colours(result: dict[str, Any]) -> dict[str, str]:
    curves = list(dict.fromkeys(point["curve"] for point in result["points"][1:]))
    return {curve: HUES[position % len(HUES)] for position, curve in enumerate(curves)}


def frontier(result: dict[str, Any], data: str) -> str:
    """Perplexity against expert loads, both over the control's; one curve for each objective."""
    farthest = max(point[data]["to_control"]["perplexity"]["ratio"] for point in result["points"])
    panels = 2 if farthest > NEAR else 1
    figure, drawn = new_axes(8.6 if panels == 1 else 11.5, 4.6, columns=panels)
    everything, *closer = [drawn] if panels == 1 else list(drawn)
    _draw(everything, result, data)
    figure.legend(
        *everything.get_legend_handles_labels(),
        frameon=False,
        fontsize=9,
        loc="outside lower center",
        ncols=8,
    )
    for axes in closer:
        _draw(axes, result, data)
        axes.set_xlim(min(0.984, axes.get_xlim()[0]), NEAR + 0.005)
        axes.set_title("the same, near the control", fontsize=10)
    figure.draw_without_rendering()  # places on the page are known after this
    (closer or [everything])[0].set_autoscale_on(False)
    _names((closer or [everything])[0], result, data)
    return svg(figure)


def _draw(axes: Any, result: dict[str, Any], data: str) -> None:
    policy, slots = reference(result)
    colours = _colours(result)
    for loss, times in zip(LOSSES, (2, 3), strict=True):
        axes.axvline(1 + loss, color="#bbb", lw=0.9, ls="--", zorder=0)
        axes.axhline(1 / times, color="#bbb", lw=0.9, ls="--", zorder=0)
        axes.annotate(
            f"{times} times fewer", (1, 1 / times), xycoords=("axes fraction", "data"), fontsize=8,
            color=GREY, ha="right", va="bottom",
        )  # fmt: skip
        axes.annotate(
            f"+{loss:.0%}", (1 + loss, 0), xycoords=("data", "axes fraction"), fontsize=8, color=GREY,
            xytext=(2, 3), textcoords="offset points",
        )  # fmt: skip
    for curve, colour in colours.items():
        points = [point for point in result["points"][1:] if point["curve"] == curve]
        found = sorted(
            ((_place(point[data], policy, slots), point) for point in points), key=lambda p: p[0][0]
        )
        line = [(1.0, 1.0), *(place for place, _ in found)]
        axes.plot(*zip(*line, strict=True), color=colour, lw=1.2, alpha=0.7)
        for position, (place, point) in enumerate(found):
            _point(axes, place, point[data], policy, slots, colour, curve if position == 0 else None)
    base = _place(result["base"][data], policy, slots)
    axes.plot(*base, marker="D", ms=6, mfc="white", mec=GREY, ls="", label="base, untouched")
    axes.plot(1, 1, marker="s", ms=7, color="black", ls="", label="control")
    axes.set(
        xlabel="perplexity / control", ylabel=f"expert loads per token / control ({policy}, {slots} slots)"
    )
    axes.set_ylim(0, None)
    axes.set_xlim(min(0.986, axes.get_xlim()[0]), max(1.06, axes.get_xlim()[1]))


def _place(measured: dict[str, Any], policy: str, slots: int) -> tuple[float, float]:
    loads = entry_at(measured["to_control"]["loads"], policy, slots)
    assert loads is not None
    return measured["to_control"]["perplexity"]["ratio"], loads["ratio"]


def _point(
    axes: Any,
    place: tuple[float, float],
    measured: dict[str, Any],
    policy: str,
    slots: int,
    colour: str,
    label: str | None,
) -> None:
    """The pooled point with its intervals, and each seed beside it."""
    ratios = measured["to_control"]["perplexity"], entry_at(measured["to_control"]["loads"], policy, slots)
    bars = [
        [[max(0.0, ratio["ratio"] - ratio["low"])], [max(0.0, ratio["high"] - ratio["ratio"])]]
        for ratio in ratios
        if ratio is not None
    ]
    axes.errorbar(
        *place, xerr=bars[0], yerr=bars[1], marker="o", ms=5.5, color=colour, lw=1.1, ls="", label=label
    )
    for seed in measured["seeds"] if len(measured["seeds"]) > 1 else ():
        axes.plot(*_place(seed, policy, slots), marker="o", ms=3, color=colour, alpha=0.35, ls="")


def _names(axes: Any, result: dict[str, Any], data: str) -> None:
    """Names beside the points, each on the side where least stands already."""
    policy, slots = reference(result)
    colours = _colours(result)
    points = [(_place(point[data], policy, slots), point) for point in result["points"][1:]]
    left, right = axes.get_xlim()
    points = [(place, point) for place, point in points if left <= place[0] <= right]
    taken = [axes.transData.transform(place) for place, _ in points]
    for place, point in points:
        x, y = axes.transData.transform(place)
        side = 2.6 * len(point["name"])  # half of a name's width in points
        sides = [(side + 8, 6), (-side - 8, -7), (side + 8, -7), (-side - 8, 7), (0, 12), (0, -13)]

        def room(offset: tuple[float, float], x: float = x, y: float = y) -> float:
            return min(abs(a - x - offset[0]) / 4 + abs(b - y - offset[1]) for a, b in taken)

        best = max(sides, key=lambda offset: min(room(offset), 11))  # the first of those with room enough
        taken.append((x + best[0], y + best[1]))
        axes.annotate(
            point["name"], place, xytext=best, textcoords="offset points", fontsize=8, ha="center",
            va="center", color=colours[point["curve"]],
        )  # fmt: skip


def budgets(result: dict[str, Any], data: str) -> str:
    """Loads over the control's at every budget: what is tuned for one serves the others."""
    policies = list(dict.fromkeys(row["policy"] for row in result["points"][0][data]["loads"]))
    height = max(3.4, 0.17 * len(result["points"]) + 1.6)
    figure, drawn = new_axes(
        4.6 * len(policies) + 0.6, height, columns=len(policies), sharey=True, squeeze=False
    )
    colours = _colours(result)
    sizes = result["settings"]["budgets"]
    for axes, policy in zip(drawn[0], policies, strict=True):
        ends = []
        for point in result["points"][1:]:
            entries = [entry_at(point[data]["to_control"]["loads"], policy, size) for size in sizes]
            ratios = [entry for entry in entries if entry is not None]
            axes.plot(
                range(len(ratios)), [ratio["ratio"] for ratio in ratios], marker="o", ms=3.5, lw=1.1,
                color=colours[point["curve"]], alpha=0.85,
            )  # fmt: skip
            ends.append((ratios[-1]["ratio"], point))
        lowest = 0.0
        for ratio, point in sorted(ends, key=lambda end: end[0]):
            lowest = max(ratio, lowest + NAME_HEIGHT / height)
            axes.annotate(
                point["name"], (len(sizes) - 1, ratio), xytext=(len(sizes) - 0.9, lowest), fontsize=8,
                va="center", color=colours[point["curve"]],
                arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#bbb"},
            )  # fmt: skip
        axes.axhline(1, color="black", lw=1)
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlim(-0.2, len(sizes) - 0.1)
        axes.set(title=policy, xlabel="slots per layer")
    drawn[0][0].set(ylabel="loads per token / control", ylim=(0, None))
    return svg(figure)


def sources(result: dict[str, Any], data: str) -> str:
    """Own against shared sets, and the balance of the load: is it locality or collapse?"""
    _, slots = reference(result)
    rows = rows_of(result, data)[::-1]
    figure, (left, right) = new_axes(10.4, 0.3 * len(rows) + 1.2, columns=2, sharey=True)
    colours = _colours(result) | {"base": GREY, "control": "black"}
    curves = {"base": "base"} | {point["name"]: point["curve"] for point in result["points"]}
    for position, (name, row) in enumerate(rows):
        colour = colours.get("control" if name == "control" else curves[name], GREY)
        static = next(entry for entry in row["static"] if entry["slots"] == slots)
        left.plot([static["shared"], static["own"]], [position] * 2, color=colour, lw=2, alpha=0.5)
        left.plot(static["own"], position, marker="o", ms=6, color=colour, ls="")
        left.plot(static["shared"], position, marker="o", ms=6, mfc="white", mec=colour, ls="")
        layers = row["load_entropy_layers"]
        right.plot([min(layers), max(layers)], [position] * 2, color=colour, lw=2, alpha=0.4)
        right.plot(row["load_entropy"], position, marker="o", ms=6, color=colour, ls="")
    left.set_yticks(range(len(rows)), [name for name, _ in rows])
    left.set(xlabel=f"share of requests that a fixed set of {slots} serves", xlim=(0, 1))
    right.set(xlabel="entropy of the load over experts, share of its maximum")
    right.set_xlim(min(0.5, right.get_xlim()[0]), 1.01)
    return svg(figure)
