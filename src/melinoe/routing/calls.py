"""What a policy is asked, and what it answers: the words between the model, the policies and the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Call:
    """What one layer was asked in one call of T tokens, K experts each.

    indices: [T, K] expert ids; ids >= the number of experts are expert-parallel sentinels.
    ages: [T] 0 for the last token of its sequence in this call, 1 for the one before, ...
    valid: [T] False for padding, which must be served but says nothing about the sequence.
    decoding: [T] True for tokens of sequences that decode while others' prompts are computed (phase is
        prefill then); None: there are none. Statistics look at it, policies do not.
    """

    indices: np.ndarray
    ages: np.ndarray
    valid: np.ndarray
    phase: str
    decoding: np.ndarray | None = None

    @property
    def steps(self) -> int:
        """How many tokens of time the call spans: the longest sequence in it, padding excluded."""
        if len(self.ages) == 1:
            return int(self.valid[0])
        return int(self.ages.max(where=self.valid, initial=-1)) + 1

    @cached_property
    def experts(self) -> list[int]:
        """The distinct ids in ascending order, sentinels included: what has to be served."""
        return sorted(set(self.indices.ravel().tolist()))


def decode_call(experts: Sequence[int] | np.ndarray) -> Call:
    """The call of one decoded token."""
    return Call(np.asarray(experts).reshape(1, -1), np.zeros(1, np.int64), np.ones(1, bool), DECODE)


def prefill_call(indices: np.ndarray) -> Call:
    """The call of one unpadded prompt, [T, K]."""
    tokens = len(indices)
    return Call(indices, np.arange(tokens - 1, -1, -1), np.ones(tokens, bool), PREFILL)


def per(count: float, of: float) -> float | None:
    """`count` for each one of `of`; None where there are none."""
    return count / of if of else None


def hit_rate(hits: float, loads: float) -> float | None:
    """Hits per expert that was asked for, first touches included; None where nothing was.

    What was asked for and is no hit is a load: so for the device, the simulator and the tables alike.
    """
    return per(hits, hits + loads)


@dataclass(frozen=True)
class Load:
    """One record to read. `admit` False: through staging. `victim` None: into a free slot."""

    expert: int
    admit: bool
    victim: int | None = None


@dataclass(frozen=True)
class Decision:
    """The answer to one call. Every expert of the call is in `hits` or in `loads`, once."""

    hits: list[int]
    loads: list[Load]
    preloads: list[Load] = field(default_factory=list)
