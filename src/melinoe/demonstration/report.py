"""report.html: one self-contained page with what was gained, what it cost, the figures and the table."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

from markupsafe import Markup

from melinoe.config import format_bytes, format_rate
from melinoe.demonstration.table import COLUMNS, cells
from melinoe.demonstration.watched import steps_of
from melinoe.report.page import times, write_page
from melinoe.report.plots import Curve, Point, curves, scatter, smoothed
from melinoe.report.setting import name_of
from melinoe.report.shapes import bars, map_of, memory, timeline

SPEED = "generation_tokens_per_second"
COLOURS = {"base": "--six", "control": "--two", "tuned": "--one"}
WEIGHTS = {"base": "the model as it was", "control": "the control", "tuned": "tuned"}
SAME_WORK = 0.05  # loads per token this near: rows that should be equally fast


def write_report(result: dict[str, Any], path: Path) -> None:
    """Writes the page, complete or not at all."""
    rows = result["rows"]
    best = fastest(result)
    write_page(
        "demo.html",
        path,
        result=result,
        heading=heading(result["settings"]),
        numbers=numbers(result),
        headings=[name for name, _, _ in COLUMNS],
        rows=[cells(row) for row in rows],
        best=None if best is None else rows.index(best),
        busy=same_work_apart(result),
        figures={
            "speed": _speed(rows),
            "frontier": _frontier(result),
            "hit_rate": _hit_rate_by_budget(result),
            "loss": _training(result, "nll", "completion NLL while tuning"),
            "misses": _training(result, "misses", "misses per token and layer while tuning"),
            **_of_the_best(result),
        },
        maps=[map_of(WEIGHTS[weights], result["load"][weights]) for weights in ("base", "tuned")],
        answers=[
            (WEIGHTS[name], text) for name, text in result.get("answers", {}).items() if name != "prompt"
        ],
        format_bytes=format_bytes,
        format_rate=format_rate,
        command=command(result["settings"]),
        headline=headline(result),
    )


def heading(settings: dict[str, Any]) -> str:
    """The model and the data by their names, wherever they lie."""
    if settings["data"] == "embedded":
        return f"{name_of(settings['model'])}, on its own workload"
    return f"{name_of(settings['model'])} on {name_of(settings['data'])}"


def command(settings: dict[str, Any]) -> str:
    """What to type for the same demo; paths are named by their last part, which is theirs elsewhere too."""
    parts = ["melinoe demo", f"--model {name_of(settings['model'])}"]
    if settings["data"] != "embedded":
        parts.append(f"--data {name_of(settings['data'])}")
    if settings.get("limit"):
        parts.append(f"--limit {settings['limit']}")
    if "sticky" in settings:
        parts.append(f"--sticky {settings['sticky']:g}")
    if settings.get("time_limit"):
        parts.append(f"--time-limit {settings['time_limit']:g}")
    return " ".join([*parts, f"--seed {settings['seed']}"])


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers that the first lines state."""
    rows = {row["name"]: row for row in result["rows"]}
    quality = result["quality"]
    best = rows["tuned + predictor"][SPEED]
    return {
        "over_peer": best / rows["accelerate disk_offload"][SPEED],
        "over_lru": best / rows["base + lru"][SPEED],
        "over_control": best / rows["control + decay"][SPEED],
        "fewer_loads": result["teacher_forced"]["pairs"]["tuned / control"],
        "nll_change": quality["tuned"]["nll"] / quality["control"]["nll"] - 1,
        "nll_to_base": quality["tuned"]["nll"] / quality["base"]["nll"] - 1,
    }


def numbers(result: dict[str, Any]) -> list[dict[str, str]]:
    """Two large numbers: how many times the speed, and the price in quality. Slower is said to be slower."""
    found = headline(result)
    ratio, noise = found["over_lru"], same_work_apart(result)
    too_near = noise is not None and max(ratio, 1 / ratio) < noise["times"]
    how = "as fast as" if ratio >= 1 else "than"
    if too_near:
        how = f"({ratio:.1f} times, too noisy to rank) with"
    quality = result["quality"]
    exact = [quality[name].get("exact_match") for name in ("tuned", "base")]
    judged = "" if None in exact else f"; exact answers {exact[0]:.1%} against {exact[1]:.1%}"
    return [
        {
            "value": times(ratio, not too_near),
            "text": f"{how} an LRU cache of the same bytes on the model as it was, and "
            f"{found['over_peer']:.0f} times the speed of accelerate's disk_offload",
        },
        {
            "value": f"{100 * found['nll_to_base']:+.1f} %",
            "text": "its price: NLL of held-out answers over that of the model as it was "
            f"({100 * found['nll_change']:+.1f} % over the same fine-tune without our losses{judged})",
        },
    ]


def paged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of ours, fastest first."""
    return sorted((row for row in result["rows"] if row["kind"] == "melinoe"), key=lambda row: -row[SPEED])


def same_work_apart(result: dict[str, Any]) -> dict[str, Any] | None:
    """The two rows of a kind that read alike for each token, and were yet furthest apart: the noise.

    Returns:
        {"fast", "slow" (rows), "times"}; None where no two rows read alike, or where they are within five
        percent.
    """
    found = None
    for fast, slow in combinations(sorted(result["rows"], key=lambda row: -row[SPEED]), 2):
        if fast["kind"] != slow["kind"]:
            continue
        ours, theirs = (row.get("loads_per_token", 0.0) for row in (fast, slow))
        if abs(ours - theirs) > SAME_WORK * max(ours, theirs):
            continue
        times = fast[SPEED] / slow[SPEED]
        if times > 1 + SAME_WORK and (found is None or times > found["times"]):
            found = {"fast": fast, "slow": slow, "times": times}
    return found


def fastest(result: dict[str, Any]) -> dict[str, Any] | None:
    """The row to highlight: the fastest of ours; None where the next is nearer than this run's noise."""
    best, *others = paged(result)
    noise = same_work_apart(result)
    bar = noise["times"] if noise else 1.0
    if not others or best[SPEED] / others[0][SPEED] > bar:
        return best
    return None


def _speed(rows: list[dict[str, Any]]) -> Markup:
    shown = []
    for row in rows:
        low, high = row[f"{SPEED}_range"]
        shown.append(
            {
                "name": row["name"],
                "note": {"resident": "no limit", "accelerate": "experts offloaded"}.get(row["kind"]),
                "value": row[SPEED],
                "low": low,
                "high": high,
                "ceiling": row["read_ceiling_tokens_per_second"],
                "text": format_rate(row[SPEED])
                + (f" ({format_rate(low)}-{format_rate(high)})" if low < high else ""),
                "colour": "--four" if row["kind"] == "accelerate" else COLOURS[row["weights"]],
            }
        )
    said = "; ".join(f"{row['name']} {format_rate(row['value'])}" for row in shown)
    return bars(shown, f"Generated tokens a second: {said}")


def _frontier(result: dict[str, Any]) -> Markup:
    """Speed against quality, under the limit."""
    points = [
        Point(
            row["name"],
            100 * (result["quality"][row["weights"]]["nll"] / result["quality"]["base"]["nll"] - 1),
            row[SPEED],
            COLOURS[row["weights"]],
        )
        for row in paged(result)
    ]
    xs = [point.x for point in points]
    room = max(max(xs) - min(xs), 0.2)
    said = "; ".join(
        f"{point.name}: {point.x:+.1f} percent, {format_rate(point.y)} tok/s" for point in points
    )
    return scatter(
        points,
        "price: NLL over the base's, percent",
        f"Speed against its price in quality. {said}",
        x=(min(xs) - 0.6 * room, max(xs) + 0.3 * room),  # names stand to the left, too
        y=(0.0, 1.15 * max(point.y for point in points)),
        x_form="{:+g}",
        y_form="{:g}",
        height=190,
    )


def _hit_rate_by_budget(result: dict[str, Any]) -> Markup:
    lines = []
    for weights in ("base", "control", "tuned"):
        for policy in ("decay", "lru"):
            points = sorted(
                (row["slots"], row["hit_rate"])
                for row in result["teacher_forced"]["results"][weights]
                if row["policy"] == policy
            )
            sizes, rates = zip(*points, strict=True)
            name = f"{weights}, {policy}"
            lines.append(Curve(name, sizes, rates, COLOURS[weights], dashed=policy != "decay"))
    said = "; ".join(f"{one.name}: {one.y[0]:.0%} to {one.y[-1]:.0%}" for one in lines)
    slots = result["settings"]["slots"]
    return curves(
        lines,
        f"slots per layer (of {result['settings']['num_experts']} experts)",
        f"Decode hit rate by budget. {said}",
        mark=slots,
    )


def _training(result: dict[str, Any], key: str, said: str) -> Markup:
    """A curve of tuning for each of both runs, smoothed, the raw one faintly behind it."""
    lines = []
    for weights in ("control", "tuned"):
        curve = result["tuning"]["curves"][weights]
        values = [point[key] for point in curve]
        steps = [point["step"] for point in curve]
        lines.append(Curve(weights, steps, smoothed(values), COLOURS[weights], raw=values))
    ends = "; ".join(f"{one.name}: {one.y[0]:.3g} to {one.y[-1]:.3g}" for one in lines)
    return curves(
        lines, "step", f"{said.capitalize()}, smoothed. {ends}", top=None, y_form="{:g}", at_points=False
    )


def _of_the_best(result: dict[str, Any]) -> dict[str, Any]:
    """One answer of the tuned model with prediction, token by token, and where its memory goes."""
    row = next(row for row in result["rows"] if row["name"] == "tuned + predictor")
    found = row.get("timeline")
    steps = steps_of(found) if found and len(found["times"]) > 2 else None
    return {
        "timeline": timeline(steps) if steps else None,
        "seconds": {name: sum(step[name] for step in steps) for name in steps[0]} if steps else {},
        "memory": memory(row.get("budget", {}), result["memory_limit_bytes"]),
    }
