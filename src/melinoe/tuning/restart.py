"""Whether a run goes on where another was interrupted.

It does with the same settings, data and base model, and a saved run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melinoe.adapters.peft_folder import Base
from melinoe.errors import MelinoeError
from melinoe.files import partial_of, write_json
from melinoe.models.identity import differing
from melinoe.tuning import saved_run
from melinoe.tuning.settings import SETTINGS, TuneSettings
from melinoe.tuning.training_rows import TrainingRows

RUN = "run.json"


@dataclass(frozen=True)
class Restart:
    """Where a run starts.

    saved, steps_done: None where it starts anew. note: what a person should know, or nothing.
    """

    saved: Path | None = None
    steps_done: int | None = None
    note: str = ""


def run_identity(settings: TuneSettings, rows: TrainingRows, base: Base) -> dict[str, Any]:
    """What a run must share with an interrupted one to go on with it.

    Two processes may go on with what one accumulated in two parts: only the number of parts counts. Experts
    may have been paged before and resident now; the base's format says how they are rounded, which its
    fingerprint does not.
    """
    tokens = json.dumps([(row.ids, row.answers) for row in rows.encoded])
    digest = hashlib.sha256(tokens.encode()).hexdigest()[:16]
    named = {name: value for name, value in settings.as_dict().items() if SETTINGS[name].changes_losses}
    return {
        "settings": named,
        "parts": rows.parts,
        "base_fingerprint": base.fingerprint,
        "data": digest,
        "base_format": base.format,
        "base_identity": base.identity,
    }


def open_run(work: Path, identity: dict[str, Any], resume: bool, overwrite: bool) -> Restart:
    """Makes the work folder, or finds the saved run in it.

    Args:
        work: OUTPUT.melinoe-partial.
        resume: this very run must have been saved there.
        overwrite: start anew whatever stands there.

    Raises:
        MelinoeError: `resume` and nothing to go on with, or another run was interrupted here and would be
            lost; nothing is removed then.
    """
    saved = work / saved_run.FOLDER
    found = (saved / saved_run.STATE).is_file()
    differs = _differences(work, identity)
    if resume and not found:
        raise MelinoeError(
            "tune: nothing to resume",
            got=f"no checkpoint in {work}",
            next_step="leave out --resume to start; a run saves one every checkpoint_steps steps",
        )
    if found and differs and not overwrite:
        raise MelinoeError(
            f"tune: the interrupted run in {work} is another one",
            got=f"other {differs}",
            next_step="give what that run was given to go on with it, --overwrite to start anew without it,"
            " or another output folder",
        )
    if found and not differs and not overwrite:
        steps = saved_run.steps_done(saved)
        return Restart(saved, steps, f"going on after step {steps} of the run in {work}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(work / RUN, identity)
    return Restart()


def kept_of(output: Path) -> str | None:
    """What an interrupted run left beside its output folder, for people; None where it saved nothing yet."""
    work = partial_of(output)
    saved = work / saved_run.FOLDER
    if not (saved / saved_run.STATE).is_file():
        return None
    return f"the first {saved_run.steps_done(saved)} steps are kept in {work}, and the same call goes on"


def _differences(work: Path, identity: dict[str, Any]) -> str:
    """What the interrupted run had otherwise, by name; empty where nothing."""
    try:
        old = json.loads((work / RUN).read_text())
        pairs = [(old, identity), (old["settings"], identity["settings"])]
    except (OSError, ValueError, KeyError):
        return "settings"
    names = [
        name
        for was, now in pairs
        for name in sorted({*was, *now} - {"settings"})
        if was.get(name) != now.get(name) and name != "base_identity"
    ]
    if differing(old.get("base_identity", {}), identity["base_identity"]):
        names.append("base weights")
    return ", ".join(names)
