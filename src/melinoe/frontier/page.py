"""What a sweep leaves for people: table.md and frontier.html, one page without files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from melinoe.files import write_text
from melinoe.frontier import figures
from melinoe.frontier.table import document, origins_table, pooled_table, reference, seeds_table, sentences
from melinoe.report.page import write_page
from melinoe.report.setting import name_of
from melinoe.report.svg import use_matplotlib

TITLES = {"held_out": "Held-out rows", "out_of_domain": "Out of domain"}


def write_frontier(result: dict[str, Any], output: Path) -> None:
    """Writes both files from what result.json holds."""
    write_text(output / "table.md", document(result))
    use_matplotlib()
    policy, slots = reference(result)
    parts = [
        {
            "title": title,
            "sequences": result["base"][data]["num_sequences"],
            "sentences": sentences(result, data),
            "pooled": pooled_table(result, data),
            "seeds": seeds_table(result, data),
            "origins": origins_table(result, data),
            "frontier": figures.frontier(result, data),
            "budgets": figures.budgets(result, data),
            "sources": figures.sources(result, data),
        }
        for data, title in TITLES.items()
        if data in result["base"]
    ]
    settings = result["settings"]
    write_page(
        "frontier.html",
        output / "frontier.html",
        result=result,
        parts=parts,
        policy=policy,
        slots=slots,
        heading=name_of(settings["model"]),
        names=[name_of(folder) for folder in settings["data"]],
    )
