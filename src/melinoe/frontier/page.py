"""What a sweep leaves for people: table.md and frontier.html, one page without files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from melinoe.files import write_text
from melinoe.frontier import figures
from melinoe.frontier.table import (
    LOSSES,
    best_within,
    document,
    origins_table,
    pooled_table,
    reference,
    rows_of,
    seeds_table,
    sentences,
)
from melinoe.report.page import write_page
from melinoe.report.setting import name_of

TITLES = {"held_out": "Held-out rows", "out_of_domain": "Out of domain"}


def write_frontier(result: dict[str, Any], output: Path) -> None:
    """Writes both files from what result.json holds."""
    write_text(output / "table.md", document(result))
    write_page("frontier.html", output / "frontier.html", **page_values(result))


def page_values(result: dict[str, Any]) -> dict[str, Any]:
    """What the page is filled with."""
    policy, slots = reference(result)
    settings = result["settings"]
    return {
        "result": result,
        "pages": [_part(result, data, title) for data, title in TITLES.items() if data in result["base"]],
        "numbers": numbers(result),
        "training": [
            (title, figure)
            for title, key in (("the task", "nll"), ("locality", "misses"))
            if (figure := figures.training(result, key, f"Training, {title}")) is not None
        ],
        "points": points_table(result),
        "policy": policy,
        "slots": slots,
        "heading": name_of(settings["model"]),
        "names": [name_of(folder) for folder in settings["data"]],
        "command": command(settings),
    }


def _part(result: dict[str, Any], data: str, title: str) -> dict[str, Any]:
    """All that is said of one of the data."""
    return {
        "title": title,
        "sequences": result["base"][data]["num_sequences"],
        "sentences": list(dict.fromkeys(sentences(result, data))),
        "pooled": pooled_table(result, data),
        "best": _row_of(result, data, headline_point(result, data)),
        "seeds": seeds_table(result, data),
        "origins": origins_table(result, data),
        "frontier": figures.frontier(result, data),
        "budgets": figures.budgets(result, data),
        "sources": figures.sources(result, data),
    }


def headline_point(result: dict[str, Any], data: str) -> dict[str, Any] | None:
    """The point that the two large numbers are of: fewest loads within 1 percent of the control's perplexity.

    Within 5 where none is; None where no point needs fewer loads within those either, or where its interval
    reaches to the control's loads: a loser is not held up.
    """
    for loss in LOSSES:
        best = best_within(result, data, loss)
        if best is not None and best["loads"]["high"] < 1:
            return best | {"loss": loss}
    return None


def numbers(result: dict[str, Any]) -> list[dict[str, str]]:
    """Two large numbers: how many times fewer loads, and the price in quality."""
    policy, slots = reference(result)
    best = headline_point(result, "held_out")
    if best is None:
        most = f"{LOSSES[-1]:.0%}"
        return [
            {
                "value": "no gain",
                "text": "No point needs fewer expert loads per token than the control for at most "
                f"{most} more perplexity.",
            }
        ]
    loads, price = best["loads"], best["perplexity"]
    of_base = result["base"]["held_out"]["to_control"]["perplexity"]["ratio"]
    sure = "" if best["sure"] else f"; it may lie above {best['loss']:.0%}"
    return [
        {
            "value": f"{1 / loads['ratio']:.1f}×",
            "text": f"fewer expert loads per token ({1 / loads['high']:.2f} to {1 / loads['low']:.2f}) than "
            f"the control, the same fine-tune without our losses: {best['name']}, {policy}, {slots} of "
            f"{result['settings']['num_experts']} experts in memory",
        },
        {
            "value": f"{100 * (price['ratio'] - 1):+.1f} %",
            "text": f"its price: perplexity of held-out completions over the control's "
            f"({100 * (price['low'] - 1):+.1f} to {100 * (price['high'] - 1):+.1f} percent{sure}); over the "
            f"model as it was {100 * (price['ratio'] / of_base - 1):+.1f} percent",
        },
    ]


def _row_of(result: dict[str, Any], data: str, best: dict[str, Any] | None) -> int | None:
    names = [name for name, _ in rows_of(result, data)]
    return None if best is None else names.index(best["name"])


def points_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What every point sets, in the words of a file of points, so that the sweep can be repeated."""
    said = [
        [point["name"], json.dumps(point.get("settings", {}), ensure_ascii=False)]
        for point in result["points"]
    ]
    return ["point", "settings that are not the default's"], said


def command(settings: dict[str, Any]) -> str:
    """What to type for the same sweep; paths are named by their last part, which is theirs elsewhere too."""
    parts = [f"melinoe tune --sweep {name_of(settings.get('points') or 'points.json')}"]
    parts.append(f"--model {name_of(settings['model'])}")
    parts.append(f"--data {','.join(name_of(folder) for folder in settings['data'])}")
    parts.append(f"--seeds {','.join(map(str, settings['seeds']))}")
    for name, option in (
        ("hold_out_rows", "hold-out"),
        ("limit", "limit"),
        ("out_of_domain", "out-of-domain"),
    ):
        if settings.get(name):
            parts.append(f"--{option} {name_of(str(settings[name]))}")
    for name, value in settings.get("common", {}).items():
        parts.append(f"--{name.replace('_', '-')} {value}")
    return " ".join([*parts, "--output-dir frontier"])
