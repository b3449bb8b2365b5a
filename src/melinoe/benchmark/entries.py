"""The rows of `melinoe bench`: who runs, on which weights, in which format, by which policy.

A row that runs is an `Entry`. Policies that others have published stand in the table too, under the name of
what they do and where it was read: as a run where our pager has that policy, else as a row of the simulator
(simulated.py), which says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from melinoe.config import DEFAULT_POLICY
from melinoe.errors import MelinoeError

RESIDENT, ACCELERATE, LLAMA_CPP, OURS = "resident", "accelerate", "llama.cpp", "melinoe"
BASE, CONTROL, TUNED = "base", "control", "tuned"


@dataclass(frozen=True)
class Entry:
    """One row that runs.

    kind: resident (stock transformers), accelerate (disk_offload of the experts), llama.cpp or melinoe.
    weights: base, control or tuned.
    precision: of the experts: auto (the checkpoint's own), int8, int4; of llama.cpp bf16, q8_0, q4_0.
    slots: experts of each layer to hold; None: as many as the memory has room for.
    predicted: the predictor's experts are loaded before decoding.
    limited: under the memory limit; the resident rows are ceilings and stand outside.
    source: where a policy of others was read.
    """

    name: str
    kind: str
    weights: str = BASE
    precision: str = "auto"
    policy: str = DEFAULT_POLICY
    slots: int | None = None
    predicted: bool = False
    limited: bool = True
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def entries(weights: list[str], predictor: bool, formats: tuple[str, ...] = ("int8", "int4")) -> list[Entry]:
    """All rows that run, in the order of the table before anything is known of their speed.

    Args:
        weights: those that there are, base among them.
        predictor: whether there is one; it is of the tuned weights, or of the base where there are none.
        formats: smaller ones that are compared too.
    """
    last = TUNED if TUNED in weights else BASE
    rows = [
        Entry("resident transformers, no limit", RESIDENT, limited=False),
        Entry("accelerate disk_offload", ACCELERATE),
        *(Entry(f"llama.cpp mmap {name}", LLAMA_CPP, precision=name) for name in ("bf16", "q8_0", "q4_0")),
        *(
            Entry(f"llama.cpp mmap bf16 {name}", LLAMA_CPP, weights=name, precision="bf16")
            for name in weights
            if name == TUNED
        ),
        Entry("no cache", OURS, policy="lru", slots=0, source="loading on demand"),
        Entry("LRU per layer", OURS, policy="lru", source="mixtral-offloading, moe-policylang"),
        Entry("visit counts", OURS, policy="lfu", source="MoE-Infinity"),
        Entry("melinoe decay", OURS),
        *(Entry(f"melinoe {name}", OURS, weights=name) for name in (CONTROL, TUNED) if name in weights),
    ]
    if predictor:
        rows.append(Entry(f"melinoe {last} + predictor", OURS, weights=last, predicted=True))
    for name in formats:
        rows.append(Entry(f"melinoe {name}", OURS, precision=name))
        if last == TUNED:
            rows.append(
                Entry(
                    f"melinoe tuned{' + predictor' * predictor} {name}",
                    OURS,
                    weights=TUNED,
                    precision=name,
                    predicted=predictor,
                )
            )
    return rows


def chosen(rows: list[Entry], names: list[str] | None) -> list[Entry]:
    """The rows of these names, in the order of the table; None: all.

    Raises:
        MelinoeError: a name that no row has.
    """
    if names is None:
        return rows
    known = [row.name for row in rows]
    for name in names:
        if name not in known:
            raise MelinoeError("bench has no such row", got=repr(name), allowed="; ".join(known))
    return [row for row in rows if row.name in names]
