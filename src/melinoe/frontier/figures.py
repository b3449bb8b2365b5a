"""The figures of a sweep: the frontier, other budgets, where the gain comes from, and how it was trained."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from melinoe.frontier.table import LOSSES, entry_at, reference, rows_of
from melinoe.report.plots import Curve, Point, curves, scatter, smoothed
from melinoe.report.shapes import COLOURS, WIDTH, spans

BROAD = 760  # pixels of the frontier on a desk
NEAR = 1.08  # perplexity ratio up to which the frontier looks; points behind it are drawn once more
CONTROL, BASE = "--ink", "--six"  # colours


def _colours(result: dict[str, Any]) -> dict[str, str]:
    own = [colour for colour in COLOURS if colour != BASE]
    found = list(dict.fromkeys(point["curve"] for point in result["points"][1:]))
    return {curve: own[position % len(own)] for position, curve in enumerate(found)}


def frontier(result: dict[str, Any], data: str) -> list[dict[str, Any]]:
    """Perplexity against expert loads, both over the control's; one curve for each objective.

    Returns:
        The look near the control, and where points lie further away, one at all of them: {"broad", "narrow"
        (the same for a telephone), "beyond" (names of points that it has no place for)}.
    """
    points = _points(result, data)
    ends = [end for point in points for end in (point.x, *(point.x_range or ()))]
    farthest = max(point.x for point in points)
    near = min(max(*(end for end in ends if end <= NEAR), 1 + LOSSES[0]), NEAR)
    looks = [_look(result, points, min(0.995, *ends) - 0.002, near + 0.006)]
    if farthest > NEAR:
        looks.append(_look(result, points, min(0.99, *ends), 1 + 1.15 * (farthest - 1)))
    return looks


def _points(result: dict[str, Any], data: str) -> list[Point]:
    policy, slots = reference(result)
    colours = _colours(result)
    points = [
        Point("base, untouched", *_place(result["base"][data], policy, slots), BASE, mark="ring"),
        Point("control", 1.0, 1.0, CONTROL, mark="square"),
    ]
    for point in result["points"][1:]:
        measured = point[data]
        ratios = (
            measured["to_control"]["perplexity"],
            entry_at(measured["to_control"]["loads"], policy, slots),
        )
        across, down = ((ratio["low"], ratio["high"]) for ratio in ratios if ratio is not None)
        several = measured["seeds"] if len(measured["seeds"]) > 1 else ()
        points.append(
            Point(
                point["name"],
                *_place(measured, policy, slots),
                colours[point["curve"]],
                point["curve"],
                x_range=across,
                y_range=down,
                others=tuple(_place(seed, policy, slots) for seed in several),
            )
        )
    return points


def _place(measured: dict[str, Any], policy: str, slots: int) -> tuple[float, float]:
    loads = entry_at(measured["to_control"]["loads"], policy, slots)
    assert loads is not None
    return measured["to_control"]["perplexity"]["ratio"], loads["ratio"]


def _look(result: dict[str, Any], points: list[Point], left: float, right: float) -> dict[str, Any]:
    policy, slots = reference(result)
    highest = max(1.0, *(point.y for point in points if left <= point.x <= right)) * 1.12
    said = "; ".join(f"{one.name}: perplexity {one.x:.3f}, loads {one.y:.2f}" for one in points)
    drawn = {
        name: scatter(
            points,
            "perplexity / control",
            f"Expert loads ({policy}, {slots} slots) against perplexity, over the control's. {said}",
            x=(left, right),
            y=(0.0, highest),
            x_form="{:g}",
            y_form="{:g}",
            start=(1.0, 1.0),
            x_guides=[(1 + loss, f"+{loss:.0%}") for loss in LOSSES if left < 1 + loss < right],
            y_guides=[(1 / times, f"{times} times fewer") for times in (2, 3)],
            width=width,
            height=height,
        )
        for name, width, height in (("broad", BROAD, 330), ("narrow", WIDTH, 260))
    }
    beyond = [point.name for point in points if not left <= point.x <= right]
    return {**drawn, "beyond": beyond}


def budgets(result: dict[str, Any], data: str) -> list[tuple[str, Markup]]:
    """For each policy, loads over the control's at every budget: what is tuned for one serves the others."""
    if len(result["points"]) == 1:
        return []  # a control alone
    policies = list(dict.fromkeys(row["policy"] for row in result["points"][0][data]["loads"]))
    colours = _colours(result)
    figures = []
    for policy in policies:
        lines, seen = [], set()
        for point in result["points"][1:]:
            found = [
                (size, entry)
                for size in result["settings"]["budgets"]
                if (entry := entry_at(point[data]["to_control"]["loads"], policy, size)) is not None
            ]
            again = point["curve"] in seen  # another point of a curve has its colour: it is dashed
            seen.add(point["curve"])
            sizes, ratios = [size for size, _ in found], [entry["ratio"] for _, entry in found]
            lines.append(Curve(point["name"], sizes, ratios, colours[point["curve"]], dashed=again))
        said = "; ".join(f"{one.name}: {one.y[0]:.2f} to {one.y[-1]:.2f}" for one in lines)
        label = f"Loads over the control's under {policy} by slots per layer. {said}"
        figures.append((policy, curves(lines, "slots per layer", label, top=None, rule=1.0, y_form="{:g}")))
    return figures


def sources(result: dict[str, Any], data: str) -> dict[str, Markup]:
    """Own against shared sets, and the balance of the load: is it locality or collapse?"""
    _, slots = reference(result)
    colours = {point["name"]: _colours(result).get(point["curve"], CONTROL) for point in result["points"]}
    sets, balance = [], []
    for name, row in rows_of(result, data):
        colour = CONTROL if name == "control" else colours.get(name, BASE)
        static = next(entry for entry in row["static"] if entry["slots"] == slots)
        own, shared, layers = static["own"], static["shared"], row["load_entropy_layers"]
        one = {"name": name, "colour": colour}
        sets.append({**one, "ring": shared, "dot": own, "text": f"{own:.0%} / {shared:.0%}"})
        balance.append(
            {**one, "dot": row["load_entropy"], "ends": (min(layers), max(layers)),
             "text": f"{row['load_entropy']:.3f}"}
        )  # fmt: skip
    lowest = min(0.5, *(end for one in balance for end in one["ends"]))
    said = [f"{one['name']}: {one['text']}" for one in sets], [f"{o['name']}: {o['text']}" for o in balance]
    return {
        "sets": spans(sets, f"Requests that a fixed set of {slots} experts serves. {'; '.join(said[0])}"),
        "balance": spans(balance, f"Entropy of the load. {'; '.join(said[1])}", lowest, 1.0),
    }


def training(result: dict[str, Any], key: str, said: str) -> Markup | None:
    """A curve of the first seed's tuning for each point, smoothed, the raw one faintly behind it."""
    colours, lines, seen = _colours(result), [], set()
    for point in result["points"]:
        curve = point.get("curves")
        if not curve or len(curve["step"]) < 2:
            continue
        again = point["curve"] in seen
        seen.add(point["curve"])
        colour = colours.get(point["curve"], CONTROL)
        raw = curve[key]
        lines.append(Curve(point["name"], curve["step"], smoothed(raw), colour, dashed=again, raw=raw))
    if not lines:
        return None
    ends = "; ".join(f"{one.name}: {one.y[0]:.3g} to {one.y[-1]:.3g}" for one in lines)
    return curves(lines, "step", f"{said}, smoothed. {ends}", top=None, y_form="{:g}", at_points=False)
