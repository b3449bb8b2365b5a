"""What computing takes on this machine, measured once and kept in $MELINOE_HOME/machine for a day.

It hangs on the processor, on versions and on our code, and on no model and no disk: another model of the same
shapes has it for nothing, and bookkeeping is measured once for all of them. What reading takes is never kept
here, a disk is not the same from hour to hour.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

from melinoe.config import home
from melinoe.errors import MelinoeError
from melinoe.files import write_json
from melinoe.runtime.facts import machine_stamp
from melinoe.runtime.probe import Measured

KEPT_SECONDS = 24 * 3600.0
KEPT_SPREAD = 0.1  # what was measured worse, beside other work, is measured again the next time


class KeptRates:
    """Means by the name of what was measured.

    Args:
        remembered: what was measured within the last day will do; False: nothing does, and what is measured
            is kept; None: nothing is read or kept.
    """

    def __init__(self, remembered: bool | None, threads: int) -> None:
        stamp = repr((machine_stamp(), threads))
        name = hashlib.sha256(stamp.encode()).hexdigest()[:24]
        self._file: Path | None = None if remembered is None else home() / "machine" / f"{name}.json"
        self._rows = self._read() if remembered is not None else {}
        self._new: dict[str, Any] = {}
        self._known = self._rows if remembered else {}

    def _read(self) -> dict[str, Any]:
        assert self._file is not None
        try:
            rows = json.loads(self._file.read_text())
            return {name: row for name, row in rows.items() if _holds(row)}
        except (OSError, ValueError, AttributeError):
            return {}

    def get(self, name: str) -> Measured | None:
        """What is known of it, and None where it is to be measured."""
        row = self._known.get(name)
        return None if row is None else Measured(float(row["seconds"]), float(row["spread"]))

    def add(self, found: dict[str, Measured]) -> None:
        """Keeps what was measured; a home that cannot be written keeps nothing."""
        if self._file is None or not found:
            return
        now, sure = time.time(), {name: one for name, one in found.items() if one.spread <= KEPT_SPREAD}
        self._new |= {name: {**vars(one), "taken": now} for name, one in sure.items()}
        with contextlib.suppress(OSError, MelinoeError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, {**self._rows, **self._new})


def _holds(row: Any) -> bool:
    """Whether a row is one, of numbers, and not too old."""
    try:
        numbers = [float(row[name]) for name in ("seconds", "spread", "taken")]
    except (KeyError, TypeError, ValueError):
        return False
    usable = all(math.isfinite(one) and one >= 0 for one in numbers)
    return usable and 0 <= time.time() - numbers[2] < KEPT_SECONDS
