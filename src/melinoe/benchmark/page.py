"""bench.html: what was gained, what it cost, and everything behind it, in one file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from markupsafe import Markup

from melinoe.benchmark.entries import ACCELERATE, BASE, CONTROL, LLAMA_CPP, OURS, RESIDENT, TUNED
from melinoe.benchmark.summary import SPEED, told_apart
from melinoe.benchmark.table import COLUMNS, SIMULATED, ordered, text_of
from melinoe.config import format_bytes, format_rate
from melinoe.demonstration.watched import steps_of
from melinoe.report.page import times, write_page
from melinoe.report.plots import Curve, Point, curves, scatter
from melinoe.report.setting import name_of
from melinoe.report.shapes import bars, map_of, memory, timeline

_KIND_COLOURS = {OURS: "--one", LLAMA_CPP: "--two", ACCELERATE: "--four"}
FAR = 1.5  # times the best NLL, behind which a row would flatten the others
_WEIGHTS = {BASE: "the model as it was", CONTROL: "the control", TUNED: "tuned"}


def write_bench_page(result: dict[str, Any], path: Path) -> None:
    """Writes the page, complete or not at all."""
    rows = ordered(result["rows"])
    limit = result["memory_limit_bytes"]
    size = format_bytes(limit) if limit else "all memory"
    near, far = _near(rows)
    write_page(
        "bench.html",
        path,
        result=result,
        heading=name_of(result["settings"]["model"]),
        limit=size,
        numbers=headline(result),
        noisy=[row["name"] for row in rows if row.get("noisy")],
        left_out=[row["name"] for row in far],
        ties=len({row["rank"] for row in rows}) < len(rows),
        figures={
            "speed": _speed(rows),
            "frontier": _frontier(near),
            "budget": _by_budget(result),
            "timeline": _timeline(result),
            "memory": memory(result["budget"], limit),
        },
        maps=[
            map_of(_WEIGHTS[name], one["map"]) for name, one in result["routing"].items() if name != CONTROL
        ],
        answers=[(_WEIGHTS[name], text) for name, text in result["answers"].items()],
        headings=[heading for heading, _, _ in COLUMNS],
        table=[[text_of(row, key, form) for _, key, form in COLUMNS] for row in rows],
        simulated_headings=[heading for heading, _, _ in SIMULATED],
        simulated=[[text_of(row, key, form) for _, key, form in SIMULATED] for row in result["simulated"]],
        command=command(result["settings"]),
        format_bytes=format_bytes,
    )


def headline(result: dict[str, Any]) -> list[dict[str, str]]:
    """Two large numbers: how many times the speed of whom, and the price in quality.

    Ours is our fastest row; the rival the fastest of others with weights in the same number of bits, under
    the same limit. Where ours is slower, that is what it says.
    """
    limited = [row for row in result["rows"] if row["limited"] or row["kind"] != "resident"]
    own = [row for row in limited if row["kind"] == OURS and not row["source"]]
    others = [row for row in limited if row["kind"] != OURS or row["source"]]
    if not own or not others:
        return []
    best = max(own, key=lambda row: row[SPEED])
    alike = [row for row in others if _bits(row) == _bits(best)] or others
    rival = max(alike, key=lambda row: row[SPEED])
    ratio = best[SPEED] / rival[SPEED]
    apart = best["rank"] != rival["rank"]
    if "speeds" in best and "speeds" in rival:  # a shared rank may be for the sake of a third row
        pair = best["speeds"], rival["speeds"]
        apart = told_apart(*pair) or told_apart(*pair[::-1])
    numbers = [
        {
            "value": times(ratio, apart),
            "text": f"{best['name']} against {rival['name']}: {format_rate(best[SPEED])} and"
            f" {format_rate(rival[SPEED])} tok/s"
            + ("" if apart else "; too close or too noisy to tell apart here"),
        }
    ]
    plain = next((row for row in result["rows"] if row["weights"] == BASE and _bits(row) == 16), None)
    if plain is not None and plain.get("nll") and best.get("nll"):
        change = best["nll"] / plain["nll"] - 1
        sense = "no worse" if change <= 0 else "worse"
        numbers.append(
            {
                "value": f"{100 * change:+.1f} %",
                "text": f"its price: NLL {best['nll']:.3f} against {plain['nll']:.3f} nats a token"
                f" on held-out text ({sense}), Rouge-L {best['rouge_l']:.2f} against {plain['rouge_l']:.2f}",
            }
        )
    return numbers


def _bits(row: dict[str, Any]) -> int:
    return {"int8": 8, "q8_0": 8, "int4": 4, "q4_0": 4}.get(row["precision"], 16)


def _speed(rows: list[dict[str, Any]]) -> Markup:
    shown = []
    for row in sorted(rows, key=lambda row: -row[SPEED]):
        low, high = row[f"{SPEED}_range"]
        several = row["repeats"] > 1
        shown.append(
            {
                "name": row["name"],
                "note": row["source"],
                "value": row[SPEED],
                "low": low if several else None,
                "high": high if several else None,
                "ceiling": row.get("read_ceiling_tokens_per_second"),
                "text": text_of(row, SPEED, "speed"),
                "colour": _colour(row),
            }
        )
    said = "; ".join(f"{row['name']} {format_rate(row['value'])}" for row in shown)
    return bars(shown, f"Generated tokens a second: {said}")


def _near(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The fastest row of each quality under the limit: those whose NLL is near the best, and the others."""
    fastest: dict[float, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row[SPEED]):
        if row.get("nll") and (row["limited"] or row["kind"] != RESIDENT):
            fastest[row["nll"]] = row
    known = list(fastest.values())
    best = min((row["nll"] for row in known), default=0.0)
    near = [row for row in known if row["nll"] <= best * FAR]
    return near, [row for row in known if row["nll"] > best * FAR]


def _frontier(rows: list[dict[str, Any]]) -> Markup | None:
    """Speed against quality."""
    if len(rows) < 2:
        return None
    points = [Point(row["name"], row["nll"], row[SPEED], _colour(row)) for row in rows]
    nlls = [row["nll"] for row in rows]
    room = 0.15 * (max(nlls) - min(nlls)) or 0.02 * max(nlls) or 0.1
    said = "; ".join(f"{row['name']}: {row['nll']:.3f} nats, {format_rate(row[SPEED])} tok/s" for row in rows)
    return scatter(
        points,
        "NLL of held-out text, nats a token",
        f"Generated tokens a second against quality. {said}",
        x=(min(nlls) - room, max(nlls) + room),
        y=(0.0, 1.1 * max(row[SPEED] for row in rows)),
        x_form="{:.3g}",
        y_form="{:g}",
    )


def _colour(row: dict[str, Any]) -> str:
    return "--six" if row["source"] else _KIND_COLOURS.get(row["kind"], "--five")


def _by_budget(result: dict[str, Any]) -> Markup | None:
    series: list[Curve] = []
    for name, one in result["routing"].items():
        if name == CONTROL:
            continue
        for policy in ("decay", "lru") if name == TUNED else ("decay", "lru", "belady"):
            points = [row for row in one["by_budget"] if row["policy"] == policy]
            label = {"decay": "melinoe", "lru": "LRU", "belady": "bound"}[policy]
            xs, ys = [row["slots"] for row in points], [row["hit_rate"] for row in points]
            series.append(Curve(f"{label}, {name}", xs, ys, dashed=policy != "decay"))
    if not series:
        return None
    said = "; ".join(f"{one.name}: {one.y[0]:.0%} to {one.y[-1]:.0%}" for one in series)
    slots = result["budget"].get("slots")
    return curves(series, "slots per layer", f"Hit rate by budget. {said}", mark=slots)


def _timeline(result: dict[str, Any]) -> Markup | None:
    found = result["timeline"]
    if len(found.get("waits", ())) < 2:
        return None
    return timeline(steps_of(found))


def command(settings: dict[str, Any]) -> str:
    """What to type for the same bench; paths are named by their last part, which is theirs elsewhere too."""
    parts = ["melinoe bench", f"--model {name_of(settings['model'])}"]
    for name in ("memory", "data", "tuned", "control", "predictor"):
        if settings[name] is not None:
            value = settings[name] if name == "memory" else name_of(settings[name])
            parts.append(f"--{name} {value}")
    for name in (
        "record_bytes", "repeats", "prompts", "new_tokens", "seconds", "quality_rows", "threads", "seed",
    ):  # fmt: skip
        parts.append(f"--{name.replace('_', '-')} {settings[name]}")
    if settings["rows"] is not None:
        parts.append(f"--rows {shlex.quote(';'.join(settings['rows']))}")
    return " ".join(parts)
