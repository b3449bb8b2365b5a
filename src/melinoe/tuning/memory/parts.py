"""Into how many parts a paged run divides its steps.

Each part of a step reads the experts that are not in slots, once per layer and pass. Parts count as one
batch, so they may as well be computed as one: each expert is then read once for all of them, layer by layer.
What stands against it is memory, since the activations of a larger batch take the place of slots. The
division that reads least is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from melinoe.errors import MelinoeError
from melinoe.tuning.memory.needed import TuningMemory


@dataclass(frozen=True)
class Division:
    """parts: batches that a process computes one after the other in a step; needed: for the largest of them.

    slots, slots_format: what the budget leaves beside that.
    """

    parts: int
    needed: TuningMemory
    slots: int
    slots_format: str | None

    @property
    def reads(self) -> int:
        """Records of one layer and pass that all parts of a step read, where each asks for every expert."""
        return self.parts * (self.needed.num_experts - self.slots)


def divide(needed_of: Callable[[int], TuningMemory], accumulate: int, memory: int) -> Division:
    """The division of a step that reads least in a budget; of equals, the fewest parts.

    Args:
        needed_of: what a run needs whose steps have so many parts.
        accumulate: the most parts. Its divisors are looked at, so that whole parts come together.
        memory: bytes.

    Raises:
        MelinoeError: not even streaming every expert fits, with the smallest parts.
    """
    found: list[Division] = []
    for parts in (number for number in range(1, accumulate + 1) if accumulate % number == 0):
        needed = needed_of(parts)
        try:
            found.append(Division(parts, needed, *needed.slots(memory)))
        except MelinoeError:
            if parts == accumulate and not found:
                raise
            continue
        if found[-1].reads == 0:  # nobody reads less
            break
    return min(found, key=lambda division: division.reads)  # the first of equals
