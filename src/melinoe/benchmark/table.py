"""The table of `melinoe bench`, for the terminal and for documents."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from melinoe.benchmark.summary import SPEED
from melinoe.config import format_bytes, format_rate

# (heading, key, format); None prints as a dash
COLUMNS: list[tuple[str, str, str]] = [
    ("rank", "rank", "rank"),
    ("", "name", "{}"),
    ("tok/s", SPEED, "speed"),
    ("predicted", "predicted_tokens_per_second", "rate"),
    ("error", "prediction_error", "{:+.0%}"),
    ("TTFT s", "ttft_seconds", "{:.3f}"),
    ("p50 ms", "token_seconds_p50", "ms"),
    ("p99 ms", "token_seconds_p99", "ms"),
    ("s/request", "seconds_per_request", "{:.2f}"),
    ("hit rate", "hit_rate", "{:.3f}"),
    ("loads/tok", "decode_loads_per_token", "{:.2f}"),
    ("decode/tok", "decode_bytes_per_token", "bytes"),
    ("prefill", "prefill_bytes_per_request", "bytes"),
    ("preload", "preload_bytes_per_request", "bytes"),
    ("of disk", "bandwidth_share", "{:.0%}"),
    ("ceiling", "read_ceiling_tokens_per_second", "rate"),
    ("peak", "peak_memory_bytes", "bytes"),
    ("NLL", "nll", "{:.4f}"),
    ("Rouge-L", "rouge_l", "{:.3f}"),
]
SIMULATED: list[tuple[str, str, str]] = [
    ("simulated", "name", "{}"),
    ("hit rate", "hit_rate", "{:.3f}"),
    ("loads/tok", "loads_per_token", "{:.2f}"),
    ("prefill loads", "prefill_loads_per_sequence", "{:.1f}"),
    ("preloads", "preload_loads_per_sequence", "{:.1f}"),
    ("from", "source", "{}"),
]


def text_of(row: dict[str, Any], key: str, form: str) -> str:
    """One cell."""
    value = row.get(key)
    if value is None:
        return "-"
    if form == "bytes":
        return format_bytes(value)
    if form == "ms":
        return f"{1000 * value:.1f}"
    if form == "rank":
        return f"{value}{'~' if row.get('noisy') else ''}"
    if form == "speed":
        low, high = row[f"{SPEED}_range"]
        span = f" ({format_rate(low)}-{format_rate(high)})" if row["repeats"] > 1 else ""
        return format_rate(value) + span
    if form == "rate":
        return format_rate(value)
    return form.format(value)


def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By rank; rows that share one in the order of the bench, so that a second run has the same order."""
    return sorted(rows, key=lambda row: row["rank"])


def print_tables(result: dict[str, Any]) -> None:
    """Prints to stdout, as wide as the tables need where stdout is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=260)
    limit = result["memory_limit_bytes"]
    under = f"under {format_bytes(limit)} of memory, page cache included" if limit else "without a limit"
    notes = [under, "rows of one rank cannot be told apart", "~: too noisy to rank"]
    for columns, rows, caption in (
        (COLUMNS, ordered(result["rows"]), "; ".join(notes)),
        (SIMULATED, result["simulated"], "the simulator, teacher-forced; no seconds"),
    ):
        if not rows:
            continue
        table = Table(caption=caption)
        for heading, key, _ in columns:
            table.add_column(heading, justify="left" if key in ("name", "source") else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(text_of(row, key, form) for _, key, form in columns))
        console.print(table)
    for name, reason in result["skipped"].items():
        console.print(f"skipped: {name}: {reason}", highlight=False, soft_wrap=True)


def markdown(result: dict[str, Any]) -> str:
    """The first table for documents."""
    rows = [[text_of(row, key, form) for _, key, form in COLUMNS] for row in ordered(result["rows"])]
    head = "| " + " | ".join(heading or "row" for heading, _, _ in COLUMNS) + " |"
    rule = "|" + "".join("---|" if key == "name" else "---:|" for _, key, _ in COLUMNS)
    return "\n".join([head, rule, *("| " + " | ".join(cells) + " |" for cells in rows)])
