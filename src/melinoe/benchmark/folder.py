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
    """A new folder, or one that was begun with the same settings and the same weights under their names.

    What it has merged, widened and converted is used again, so weights that were replaced since are others.

    Args:
        reads: what the bench reads, by name; None: nothing.

    Raises:
        MelinoeError: it has a bench of other settings or weights, or something that is none.
    """
    Output(output, BENCH, reads, replace=True).check()
    weights = {name: _stamps(Path(source)) for name, source in reads.items() if source is not None}
    card = {"format": FORMAT, "version": VERSION, "settings": settings, "weights": weights}
    if (output / SETTINGS).is_file():
        found = json.loads((output / SETTINGS).read_text())
        before, known = found["settings"], found.get("weights", weights)  # none in folders from before
        replaced = [f"weights of {name}" for name in weights if known.get(name) != weights[name]]
        if before == settings and not replaced and not overwrite:
            return
        if not overwrite:
            changed = sorted(name for name in settings if before.get(name) != settings[name]) + replaced
            raise MelinoeError(
                f"{output} has a bench of other settings",
                got=", ".join(changed),
                next_step="choose another folder, or begin anew with --overwrite",
            )
        empty(output)
    write_json(output / SETTINGS, card, indent=1)


def _stamps(source: Path) -> dict[str, list[int]]:
    """{file: size and time of writing in nanoseconds} of the weights of what is read."""
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    status = {file.name: file.stat() for file in files if file.is_file()}
    return {name: [one.st_size, one.st_mtime_ns] for name, one in status.items()}


def slug(name: str) -> str:
    """The name of a row or of a precision as a file's."""
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
