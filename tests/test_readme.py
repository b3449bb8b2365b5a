"""What README.md tells people to type, typed: every command in its order, and the block of Python.

The model is the embedded one, the data are a few rows, runs are short; all else is as it stands there.
"""

from __future__ import annotations

import re
import shlex
from html import escape
from pathlib import Path
from xml.etree import ElementTree

from typer.testing import CliRunner

from melinoe.cli.main import app
from melinoe.tiny.workload import write_splits
from readme_demo import BEGIN, END, ROWS, figure, written
from test_pages import demonstration as demo_result

ROOT = Path(__file__).parents[1]
PLACEHOLDERS = {"M": "tiny", "D": "data", "allenai/OLMoE-1B-7B-0924": "tiny", "default": "points.yaml"}
# so that each takes seconds; of a sweep only the control, where the built-in points would take minutes
SHORTER = {
    "generate": ["--max-new-tokens", "8"],
    "plan": [],
    "tune": ["--max-steps", "2", "--batch-tokens", "512"],
    "merge": [],
    "trace": ["--limit", "16"],
    "simulate": [],
    "fit-predictor": [],
    "convert": [],
    "evaluate": ["--limit", "4"],
}
POINTS = "measure: {slots: [8], policies: [decay]}\npoints: [{name: control}]\n"


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in their order."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )


def commands() -> list[list[str]]:
    """The arguments of every `melinoe` command, comments left out."""
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    assert all(line[0] == "melinoe" for line in lines if line)
    return [line[1:] for line in lines if line]


def test_what_the_readme_says_works(tmp_path, monkeypatch, capsys):
    """The commands one after the other, each on what those before it wrote; then the block of Python."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    write_splits(Path("data"), 40, 8, 24, seed=0)
    Path("points.yaml").write_text(POINTS)
    for command in commands():
        arguments = [PLACEHOLDERS.get(word, word) for word in command] + SHORTER[command[0]]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"melinoe {' '.join(arguments)}: {result.output}"
    (block,) = blocks("python")
    exec(compile(block, "README.md", "exec"), {})
    *_, last = capsys.readouterr().out.split()
    assert 0 < float(last) <= 1  # the hit rate


def test_the_other_commands_of_the_readme_are_targets_of_make():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^    make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(f"\n{target}: " in makefile for target in targets)


def test_what_the_map_of_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text()
    table = text.split("## Where things are")[1].split("\n\n")[1]
    named = {name for name in re.findall(r"`([\w./]+)`", table.split("\n", 1)[1]) if "/" in name}
    assert len(named) > 15
    missing = [name for name in named if not (ROOT / "src" / "melinoe" / name).exists()]
    assert not missing


def test_the_first_screen_says_what_docs_results_says():
    """Five rows whose numbers stand in a table there, a figure of the same speeds, and what repeats it."""
    page, results = (ROOT / "README.md").read_text(), (ROOT / "docs" / "results.md").read_text()
    demo = results.split("## The demo")[1].split("\n## ")[0]
    shown = page.split(BEGIN)[1].split(END)[0]
    drawn = (ROOT / "docs" / "demo.svg").read_text()
    assert page.index(END) < page.index("    make demo") < page.index("## Use")
    for name, said in ROWS.items():
        cells = next(line for line in shown.splitlines() if line.startswith(f"| {said} |")).split(" | ")[1:-1]
        there = [line.split(" | ") for line in demo.splitlines() if line.startswith(f"| {name} |")]
        assert any(set(cells) <= {cell.strip(" |") for cell in line} for line in there), name
        assert f">{cells[0]}</text>" in drawn and escape(said) in drawn


def test_the_first_screen_is_written_by_a_tool():
    result = demo_result("tiny")
    for name in ("resident base", "tuned + decay"):
        result["rows"].append(result["rows"][0] | {"name": name, "kind": name.split()[0]})
    for row in result["rows"]:
        row["kind"] = {"tuned": "melinoe"}.get(row["kind"], row["kind"])
    drawn = figure(result)
    ElementTree.fromstring(drawn)
    assert drawn.count('height="18"') == 2 * len(ROWS) and "prefers-color-scheme: dark" in drawn
    page = written(f"before\n{BEGIN}old\n{END}after\n", result)
    assert page.startswith("before\n") and page.endswith(f"{END}after\n") and "old" not in page
    assert page.count("\n| ") == len(ROWS) + 1
    assert "needs 2.0 times the expert loads" in page
