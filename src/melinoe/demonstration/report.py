"""report.html: one self-contained page with the table, four figures and how they came about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from melinoe.config import format_bytes
from melinoe.demonstration.table import COLUMNS, cells
from melinoe.demonstration.watched import steps_of
from melinoe.report.page import write_page
from melinoe.report.setting import name_of
from melinoe.report.shapes import heat, memory, timeline
from melinoe.report.svg import new_axes, svg, use_matplotlib

COLOURS = {"base": "#6b7280", "control": "#c2853d", "tuned": "#2563a8", "peer": "#a3484f"}


def write_report(result: dict[str, Any], path: Path) -> None:
    """Writes the page, complete or not at all."""
    use_matplotlib()
    write_page(
        "demo.html",
        path,
        result=result,
        headings=[heading for heading, _, _ in COLUMNS],
        rows=[(row, cells(row)) for row in result["rows"]],
        figures={
            "hit_rate": _hit_rate_by_budget(result),
            "speed": _speed(result),
            "load": _load(result),
            "loss": _loss_curves(result),
            **_of_the_best(result),
        },
        maps=[(weights, _map(weights, result["load"][weights])) for weights in ("base", "tuned")],
        answers=[(name, text) for name, text in result.get("answers", {}).items() if name != "prompt"],
        format_bytes=format_bytes,
        name_of=name_of,
        headline=headline(result),
    )


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers that the first paragraph states."""
    rows = {row["name"]: row for row in result["rows"]}
    quality = result["quality"]
    paged = [row for row in result["rows"] if row["kind"] == "melinoe"]  # whoever is fastest is highlighted
    best = rows["tuned + predictor"]["generation_tokens_per_second"]
    return {
        "over_peer": best / rows["accelerate disk_offload"]["generation_tokens_per_second"],
        "over_lru": best / rows["base + lru"]["generation_tokens_per_second"],
        "over_control": best / rows["control + decay"]["generation_tokens_per_second"],
        "fewer_loads": result["teacher_forced"]["pairs"]["tuned / control"],
        "nll_change": quality["tuned"]["nll"] / quality["control"]["nll"] - 1,
        "nll_to_base": quality["tuned"]["nll"] / quality["base"]["nll"] - 1,
        "best": max(paged, key=lambda row: row["generation_tokens_per_second"])["name"],
    }


def _hit_rate_by_budget(result: dict[str, Any]) -> str:
    figure, axes = new_axes()
    for weights in ("base", "control", "tuned"):
        for policy, style in (("decay", "-"), ("lru", ":")):
            points = sorted(
                (row["slots"], row["hit_rate"])
                for row in result["teacher_forced"]["results"][weights]
                if row["policy"] == policy
            )
            sizes, rates = zip(*points, strict=True)
            axes.plot(
                sizes, rates, style, marker="o", ms=3.5, color=COLOURS[weights], label=f"{weights}, {policy}"
            )
    axes.axvline(result["settings"]["slots"], color="#999", lw=0.8)
    axes.set(
        xlabel=f"slots per layer (of {result['settings']['num_experts']} experts)", ylabel="decode hit rate"
    )
    axes.set_ylim(0, 1)
    axes.set_xticks(sizes)
    axes.legend(frameon=False, fontsize=8, ncols=3)
    return svg(figure)


def _speed(result: dict[str, Any]) -> str:
    rows = result["rows"][::-1]
    figure, axes = new_axes(6.4, 0.34 * len(rows) + 0.9)
    colours = [COLOURS["peer"] if row["kind"] == "accelerate" else COLOURS[row["weights"]] for row in rows]
    speeds = [row["generation_tokens_per_second"] for row in rows]
    low, high = zip(*(row["generation_tokens_per_second_range"] for row in rows), strict=True)
    spread = [
        [max(0.0, s - a) for s, a in zip(speeds, low, strict=True)],
        [max(0.0, b - s) for s, b in zip(speeds, high, strict=True)],
    ]
    names = [row["name"] for row in rows]
    axes.barh(names, speeds, xerr=spread, color=colours, height=0.66, error_kw={"lw": 0.9, "ecolor": "#333"})
    ceilings = [row["read_ceiling_tokens_per_second"] for row in rows]
    limit = max(speeds) * 1.18
    for position, ceiling in enumerate(ceilings):
        if ceiling is not None and ceiling <= limit:
            axes.plot([ceiling, ceiling], [position - 0.4, position + 0.4], color="black", lw=1.4)
    for position, speed in enumerate(speeds):
        axes.text(
            max(speed, high[position]) + limit * 0.012, position, f"{speed:.1f}", va="center", fontsize=8
        )
    axes.set(xlabel="generated tokens per second: median, range over requests", xlim=(0, limit))
    axes.grid(axis="y", visible=False)
    return svg(figure)


def _of_the_best(result: dict[str, Any]) -> dict[str, Any]:
    """One answer of the tuned model with prediction, token by token, and where its memory goes."""
    row = next(row for row in result["rows"] if row["name"] == "tuned + predictor")
    found = row.get("timeline")
    return {
        "timeline": timeline(steps_of(found)) if found and len(found["times"]) > 2 else None,
        "memory": memory(row.get("budget", {}), result["memory_limit_bytes"]),
    }


def _map(weights: str, shares: list[list[float]]) -> Markup:
    top = [sum(layer[: max(1, len(layer) // 4)]) for layer in shares]
    mean = sum(top) / len(top)
    return heat(shares, f"{weights}: a quarter of the experts of a layer serves {mean:.0%} of its requests")


def _load(result: dict[str, Any]) -> str:
    figure, axes = new_axes()
    for weights, layers in result["load"].items():
        mean = [sum(layer[rank] for layer in layers) / len(layers) for rank in range(len(layers[0]))]
        axes.plot(range(1, len(mean) + 1), mean, marker="o", ms=3, color=COLOURS[weights], label=weights)
    axes.axhline(1 / result["settings"]["num_experts"], color="#999", lw=0.8)
    axes.set(xlabel="experts, most asked first", ylabel="share of decode requests", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def _loss_curves(result: dict[str, Any]) -> str:
    figure, (left, right) = new_axes(6.4, 3.0, columns=2)
    for weights in ("control", "tuned"):
        curve = result["tuning"]["curves"][weights]
        steps = [point["step"] for point in curve]
        left.plot(steps, [point["nll"] for point in curve], color=COLOURS[weights], label=weights, lw=1)
        right.plot(steps, [point["misses"] for point in curve], color=COLOURS[weights], lw=1)
    left.set(xlabel="step", ylabel="completion NLL (training)")
    right.set(xlabel="step", ylabel="misses per token and layer")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False, fontsize=8)
    return svg(figure)
