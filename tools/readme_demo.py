"""Writes the figure and the table on README's first screen from a result of the demo.

    make demo && python tools/readme_demo.py demo-output/result.json

The figure is docs/demo.svg, readable by day and by night. The table stands in README.md between two marks.
Its numbers should stand in docs/results.md too (tests/test_readme.py compares).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from markupsafe import escape

from melinoe.demonstration.report import numbers
from melinoe.demonstration.table import cells_of

ROOT = Path(__file__).parents[1]
FIGURE, PAGE = ROOT / "docs" / "demo.svg", ROOT / "README.md"
BEGIN, END = "<!-- written by tools/readme_demo.py -->\n", "<!-- to here -->\n"
ROWS = {  # of the demo, by the names that a reader who has seen nothing yet understands
    "accelerate disk_offload": "accelerate, experts on disk",
    "base + lru": "LRU cache, the model as it was",
    "tuned + decay": "melinoe, tuned",
    "tuned + predictor": "melinoe, tuned + predictor",
    "resident base": "stock transformers, all in memory",
}
COLUMNS = ["gen tok/s", "TTFT s", "loads/tok", "NLL", "exact", "expert bytes"]
COLOURS = {"accelerate": "four", "melinoe": "one", "resident": "six"}
WIDTH, LINE, TOP = 640, 34, 138
STYLE = """
  text { font: 15px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1c2733; }
  .large { font-size: 40px; font-weight: 700; } .soft { fill: #5b6875; font-size: 13px; }
  .paper { fill: #fff; stroke: #d9dfe5; } .track { fill: #eef1f4; }
  .one { fill: #2563a8; } .four { fill: #a3484f; } .six { fill: #6b7280; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e9ee; } .soft { fill: #9aa7b4; } .paper { fill: #14181d; stroke: #323b45; }
    .track { fill: #222a32; } .one { fill: #6ea8e6; } .four { fill: #e0808a; } .six { fill: #a3adb8; }
  }
"""


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that are shown, in the order of ROWS."""
    found = {row["name"]: row for row in result["rows"]}
    return [found[name] for name in ROWS]


def figure(result: dict[str, Any]) -> str:
    """The two large numbers of the demo's page, and a bar for each row."""
    rows, shape = rows_of(result), result["settings"]
    fastest = max(row["generation_tokens_per_second"] for row in rows)
    faster, price = numbers(result)
    said = "; ".join(f"{ROWS[row['name']]} {row['generation_tokens_per_second']:.1f}" for row in rows)
    body = "".join(
        f'<text class="large" x="{x}" y="56">{escape(value)}</text>'
        f'<text class="soft" x="{x}" y="78">{escape(first)}</text>'
        f'<text class="soft" x="{x}" y="95">{escape(second)}</text>'
        for x, value, first, second in (
            (24, faster["value"], "the speed of an LRU cache", "of the same bytes"),
            (330, price["value"], "its price: NLL of held-out answers,", "over that of the model as it was"),
        )
    )
    body += (
        f'<text class="soft" x="24" y="{TOP - 10}">Generated tokens a second, {shape["slots"]} of '
        f"{shape['num_experts']} experts of each layer in memory</text>"
    )
    for number, row in enumerate(rows):
        speed, y = row["generation_tokens_per_second"], TOP + number * LINE
        colour = "six" if row["name"] == "base + lru" else COLOURS[row["kind"]]
        width = 276 * speed / fastest
        body += (
            f'<text x="24" y="{y + 18}">{escape(ROWS[row["name"]])}</text>'
            f'<rect class="track" x="292" y="{y + 4}" width="276" height="18"/>'
            f'<rect class="{colour}" x="292" y="{y + 4}" width="{width:.1f}" height="18"/>'
            f'<text x="574" y="{y + 18}">{speed:.1f}</text>'
        )
    height = TOP + len(rows) * LINE + 14
    label = escape(f"Generated tokens a second: {said}. Price: {price['value']} NLL.")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="{label}">\n'
        f"<title>{label}</title>\n<style>{STYLE}</style>\n"
        f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>\n'
        f"{body}\n</svg>\n"
    )


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown, and what must be known to read them: the control, and where it ran."""
    lines = ["| | tok/s | TTFT s | expert loads a token | NLL | exact answers | experts in memory |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows_of(result):
        lines.append("| " + " | ".join([ROWS[row["name"]], *cells_of(row, COLUMNS)]) + " |")
    forced, quality = result["teacher_forced"]["pairs"]["tuned / control"], result["quality"]
    shape, processor = result["settings"], result["machine"]["processor"].replace("(R)", "")
    times = f"{1 / forced['ratio']:.1f} times the expert loads of ours on held-out text"
    everything = "[all rows](docs/results.md#the-demo-speed-at-equal-bytes)"
    lines += [
        "",
        f"The embedded model, {shape['slots']} of {shape['num_experts']} experts of each layer in memory, "
        f"one thread ({processor}).",
        f"The control, the same fine-tune without our losses, needs {times};",
        f"its NLL is {quality['control']['nll']:.4f} ({everything}).",
    ]
    return "\n".join(lines) + "\n"


def written(page: str, result: dict[str, Any]) -> str:
    """The page with the table of this result between its marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table(result) + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    read = json.loads(Path(sys.argv[1]).read_text())
    FIGURE.write_text(figure(read), encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), read), encoding="utf-8")
