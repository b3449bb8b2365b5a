"""The table of the demo, for the terminal and for documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from melinoe.config import format_bytes, format_rate

# (heading, key, format); None prints as a dash
COLUMNS: list[tuple[str, str, str]] = [
    ("", "name", "{}"),
    ("gen tok/s", "generation_tokens_per_second", "rate"),
    ("TTFT s", "ttft_seconds", "{:.3f}"),
    ("s/request", "seconds_per_request", "{:.2f}"),
    ("hit rate", "hit_rate", "{:.3f}"),
    ("loads/tok", "loads_per_token", "{:.2f}"),
    ("prefill loads", "prefill_loads_per_request", "{:.0f}"),
    ("preloads", "preload_loads_per_request", "{:.1f}"),
    ("bytes/tok", "bytes_per_token", "bytes"),
    ("NLL", "nll", "{:.4f}"),
    ("exact", "exact_match", "{:.3f}"),
    ("Rouge-L", "rouge_l", "{:.3f}"),
    ("expert bytes", "expert_bytes_resident", "bytes"),
]


def cells(row: dict[str, Any]) -> list[str]:
    """One row as text."""
    return cells_of(row, [heading for heading, _, _ in COLUMNS])


def cells_of(row: dict[str, Any], headings: list[str]) -> list[str]:
    """Some columns of one row, by their headings."""
    columns = {heading: (key, form) for heading, key, form in COLUMNS}
    written: dict[str, Callable[[Any], str]] = {"bytes": format_bytes, "rate": format_rate}
    texts = []
    for key, form in map(columns.__getitem__, headings):
        value = row.get(key)
        texts.append("-" if value is None else written.get(form, form.format)(value))
    return texts


def print_table(result: dict[str, Any]) -> None:
    """Prints to stdout, as wide as the table needs where stdout is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(
        caption="page cache dropped before each row; every row's tokens equal those of the resident model"
    )
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(*cells(row))
    console.print(table)


def markdown_table(result: dict[str, Any]) -> str:
    """The same table for docs/results.md."""
    head = "| " + " | ".join(heading or "row" for heading, _, _ in COLUMNS) + " |"
    rule = "|---" + "|---:" * (len(COLUMNS) - 1) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(cells(row)) + " |" for row in result["rows"])])
