"""Whether a run goes on where another was interrupted.

It does with the same settings, data and base model, and a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melinoe.data.rows import Encoded
from melinoe.errors import MelinoeError
from melinoe.tuning.checkpoint import CHECKPOINT, STATE, steps_done
from melinoe.tuning.settings import SETTINGS, TuneSettings

RUN = "run.json"


@dataclass(frozen=True)
class Restart:
    """checkpoint, steps_done: None where the run starts anew. note: what a person should know, or nothing."""

    checkpoint: Path | None = None
    steps_done: int | None = None
    note: str = ""


def run_identity(
    settings: TuneSettings,
    parts: int,
    base_fingerprint: str,
    encoded: list[Encoded],
    base_format: str = "auto",
) -> dict[str, Any]:
    """What a run must share with an interrupted one to go on with it.

    Two processes may go on with what one accumulated in two parts: only the number of parts counts. Experts
    may have been paged before and resident now; base_format says how they are rounded, which the fingerprint
    does not.
    """
    digest = hashlib.sha256(json.dumps([row.ids for row in encoded]).encode()).hexdigest()[:16]
    named = {name: value for name, value in settings.as_dict().items() if SETTINGS[name].changes_losses}
    return {
        "settings": named,
        "parts": parts,
        "base_fingerprint": base_fingerprint,
        "data": digest,
        "base_format": base_format,
    }


def open_run(work: Path, identity: dict[str, Any], resume: bool, overwrite: bool) -> Restart:
    """Makes the work folder, or finds the checkpoint in it.

    Args:
        work: OUTPUT.partial.
        resume: there must be a checkpoint of this very run.
        overwrite: start anew whatever stands there.

    Raises:
        MelinoeError: `resume` and nothing to go on with; nothing is removed then.
    """
    checkpoint = work / CHECKPOINT
    found = (checkpoint / STATE).is_file()
    differs = _differences(work, identity)
    if resume and not found:
        raise MelinoeError(
            "tune: nothing to resume",
            got=f"no checkpoint in {work}",
            next_step="leave out --resume to start; a run saves one every checkpoint_steps steps",
        )
    if resume and differs:
        raise MelinoeError(
            f"tune: the run in {work} is another one",
            got=f"other {differs}",
            next_step="give what that run was given, or --overwrite to start anew",
        )
    if found and not differs and not overwrite:
        steps = steps_done(checkpoint)
        return Restart(checkpoint, steps, f"going on after step {steps} of the run in {work}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / RUN).write_text(json.dumps(identity))
    note = f"starting anew: the interrupted run had other {differs}" if found and differs else ""
    return Restart(note="" if overwrite else note)


def _differences(work: Path, identity: dict[str, Any]) -> str:
    """What the interrupted run had otherwise, by name; empty where nothing."""
    try:
        old = json.loads((work / RUN).read_text())
        pairs = [("", old, identity), ("", old["settings"], identity["settings"])]
    except (OSError, ValueError, KeyError):
        return "settings"
    names = [
        name
        for _, was, now in pairs
        for name in sorted({*was, *now} - {"settings"})
        if was.get(name) != now.get(name)
    ]
    return ", ".join(names)
