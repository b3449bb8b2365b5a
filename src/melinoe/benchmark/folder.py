"""The folder of a bench: what says that it is one, of which settings, and what its files are called."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from melinoe.errors import MelinoeError
from melinoe.files import empty, write_json
from melinoe.outputs import Kind, Output

FORMAT, VERSION = "melinoe-bench", "1"
SETTINGS = "bench.json"


def _foreign(folder: Path) -> str:
    try:
        found = json.loads((folder / SETTINGS).read_text()).get("format")
    except (OSError, ValueError, AttributeError):
        found = None
    return "" if found == FORMAT else f"a folder without the {SETTINGS} of a bench"


BENCH = Kind("a bench", True, _foreign)


def begin(output: Path, reads: dict[str, Any], settings: dict[str, Any], overwrite: bool) -> None:
    """A new folder, or one that was begun with the same settings.

    Raises:
        MelinoeError: it has a bench of other settings, or something that is none.
    """
    Output(output, BENCH, reads, replace=True).check()
    card = {"format": FORMAT, "version": VERSION, "settings": settings}
    if (output / SETTINGS).is_file():
        before = json.loads((output / SETTINGS).read_text())["settings"]
        if before == settings and not overwrite:
            return
        if not overwrite:
            changed = sorted(name for name in settings if before.get(name) != settings[name])
            raise MelinoeError(
                f"{output} has a bench of other settings",
                got=", ".join(changed),
                next_step="choose another folder, or begin anew with --overwrite",
            )
        empty(output)
    write_json(output / SETTINGS, card, indent=1)


def slug(name: str) -> str:
    """The name of a row or of a precision as a file's."""
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
