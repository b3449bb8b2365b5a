"""What a plan is made of, whatever the budget: counted and measured once, and kept for a while.

Counting needs torch and transformers, which take seconds to be imported, and measuring takes more. Whoever
compares budgets asks for the same again and again, and gets it from $MELINOE_HOME/plans: of the same model
files, libraries, code and machine, and for as long as what was measured is likely to hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melinoe.config import home
from melinoe.errors import MelinoeError
from melinoe.files import write_json
from melinoe.runtime.division import Needs
from melinoe.runtime.speed import Rates, Shape

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

KEPT_SECONDS = 3600.0
_ENVIRONMENT = (
    "OMP_",
    "MKL_",
    "ONEDNN_",
    "DNNL_",
    "ATEN_",
    "MELINOE_",
)  # what computing and measuring hang on


@dataclass(frozen=True)
class Facts:
    """Of a model on this machine.

    needs: bytes, whatever the slots. records: (experts, bytes of a slot) of each layer, in the store's own
    form. read_bytes: of a record of each layer. buffer_bytes: what packed records are expanded with.
    bandwidth: bytes a second, or None, and not_measured why. formats: `records` of every store format, and
    rates: of those that were measured; both for predictions. taken: seconds since the epoch.
    """

    needs: Needs
    records: list[tuple[int, int]]
    read_bytes: list[int]
    buffer_bytes: int
    bandwidth: float | None
    not_measured: str | None
    shape: Shape
    formats: dict[str, list[tuple[int, int]]]
    rates: dict[str, Rates]
    taken: float

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Facts:
        """Raises ValueError, KeyError or TypeError for what it does not describe."""
        return cls(
            needs=Needs(**{name: int(number) for name, number in data["needs"].items()}),
            records=_pairs(data["records"]),
            read_bytes=[int(size) for size in data["read_bytes"]],
            buffer_bytes=int(data["buffer_bytes"]),
            bandwidth=None if data["bandwidth"] is None else float(data["bandwidth"]),
            not_measured=data["not_measured"],
            shape=Shape(**{name: int(number) for name, number in data["shape"].items()}),
            formats={name: _pairs(sizes) for name, sizes in data["formats"].items()},
            rates={
                name: Rates(**{**rates, "group_seconds": tuple(rates["group_seconds"])})
                for name, rates in data["rates"].items()
            },
            taken=float(data["taken"]),
        )


def _pairs(data: Any) -> list[tuple[int, int]]:
    return [(int(count), int(size)) for count, size in data]


def place_of(folder: Path, asked: dict[str, Any]) -> Path:
    """Where the facts of a model folder are kept.

    Args:
        asked: what else they hang on.
    """
    found = {*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")}
    files = sorted(found)
    stamps = [(str(file.relative_to(folder)), *_stamp(file)) for file in files]
    given = [str(folder.resolve()), stamps, sorted(asked.items()), machine_stamp()]
    return home() / "plans" / f"{hashlib.sha256(repr(given).encode()).hexdigest()[:24]}.json"


def machine_stamp() -> str:
    """What computing hangs on: this machine, what the environment says, and the code."""
    environment = sorted(item for item in os.environ.items() if item[0].startswith(_ENVIRONMENT))
    machine = platform.node(), platform.machine(), os.cpu_count(), sorted(os.sched_getaffinity(0))
    return repr((code_stamp(), environment, machine))


def _stamp(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError:  # a link to what is gone, which whoever opens it refuses
        return 0, 0
    return status.st_size, status.st_mtime_ns


@cache
def code_stamp() -> str:
    """What counts and measures: versions, and our own files, which change without one."""
    package = Path(__file__).parents[1]
    stamps = [_stamp(file) for file in sorted(package.rglob("*.py"))]
    return f"{version('torch')} {version('transformers')} {package} {stamps}"


def kept(place: Path) -> Facts | None:
    """The facts that are kept there; None: there are none that can be read, or they are too old."""
    try:
        found = Facts.from_json(json.loads(place.read_text(), parse_constant=_no_number))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if 0 <= time.time() - found.taken < KEPT_SECONDS else None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of a plan")


def keep(place: Path, counted: DataclassInstance) -> None:
    """Writes what was counted below $MELINOE_HOME; a home that cannot be written keeps nothing."""
    with contextlib.suppress(OSError, MelinoeError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, asdict(counted))
