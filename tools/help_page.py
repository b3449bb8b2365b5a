"""Writes docs/help.md from the command line itself: what every verb's --help says, and what only recipes set.

    python tools/help_page.py            # writes it; a test compares (tests/test_help.py)

The melinoe that this interpreter imports is the one that is asked.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import typer

from melinoe.cli.main import app
from melinoe.tuning.settings import SETTINGS

PAGE = Path(__file__).parents[1] / "docs" / "help.md"
WIDTH = 100

HEAD = """# The command line

Written by `python tools/help_page.py` from `melinoe VERB --help`; do not edit.
"""

RECIPES = """
## Settings of a recipe

A recipe (`melinoe tune --recipe FILE`, a YAML file) and the points of a sweep ([sweep.md](sweep.md)) may set
every option of `tune` that has a default, by its name with underscores (`--max-steps` is `max_steps`), and
also:

| setting | default | allowed | what it does |
|---|---|---|---|
"""


def help_of(*verb: str) -> str:
    """What `melinoe VERB --help` prints."""
    printed = io.StringIO()
    command = typer.main.get_command(app)
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        command.main([*verb, "--help"], prog_name="melinoe", terminal_width=WIDTH)
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def page() -> str:
    """The whole of docs/help.md."""
    verbs = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    parts = [f"\n```text\n{help_of()}\n```\n"]
    parts += [f"\n## melinoe {verb}\n\n```text\n{help_of(verb)}\n```\n" for verb in verbs]
    rows = [
        f"| `{name}` | {about.if_not_given} | {about.allowed.replace(' | ', ' or ')} | {about.help} |\n"
        for name, about in SETTINGS.items()
        if about.in_recipes_only
    ]
    old = [f"`{about.formerly}` (now `{name}`)" for name, about in SETTINGS.items() if about.formerly]
    return (
        HEAD
        + "".join(parts)
        + RECIPES
        + "".join(rows)
        + f"\nEarlier names are still read: {', '.join(old)}.\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
