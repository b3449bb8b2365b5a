"""What was measured of one set of weights, as sums per sequence, and what is said of it.

Sums, because seeds are then pooled by adding, and a part of the rows is a part of every array.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from melinoe.measure.intervals import perplexity_ratio, ratio_of_sums
from melinoe.routing.calls import hit_rate, per


@dataclass(frozen=True)
class Replay:
    """A cache of so many slots per layer under a policy. loads, hits: [S], while decoding."""

    policy: str
    slots: int
    loads: np.ndarray
    hits: np.ndarray


@dataclass(frozen=True)
class FixedSets:
    """Hits [S] of the best fixed set of each sequence (own) and of the one best for all (shared)."""

    slots: int
    own: np.ndarray
    shared: np.ndarray


@dataclass(frozen=True)
class Sums:
    """What is summed for each of S sequences, in their order.

    nll, tokens: [S] nats of each completion and its tokens. decoded: [S] tokens that decoding would feed.
    requests: [S] experts that they ask for. replays: policy by policy. fixed_sets: one for each budget.
    """

    nll: np.ndarray
    tokens: np.ndarray
    decoded: np.ndarray
    requests: np.ndarray
    replays: tuple[Replay, ...]
    fixed_sets: tuple[FixedSets, ...]

    def replay(self, policy: str, slots: int) -> Replay:
        return next(one for one in self.replays if (one.policy, one.slots) == (policy, slots))

    def only(self, chosen: list[bool]) -> Sums:
        """Some of the sequences."""
        return _combined(lambda arrays: arrays[0][np.asarray(chosen)], [self])

    def to_json(self) -> dict[str, Any]:
        return asdict(_combined(lambda arrays: arrays[0].tolist(), [self]))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Sums:
        parts = {
            "replays": tuple(Replay(**one) for one in data["replays"]),
            "fixed_sets": tuple(FixedSets(**one) for one in data["fixed_sets"]),
        }
        return _combined(lambda lists: np.array(lists[0], np.float64), [cls(**data | parts)])


def pooled(seeds: list[Sums]) -> Sums:
    """The sums of several seeds, added; each seed has seen the same sequences."""
    return _combined(lambda arrays: np.sum(arrays, axis=0), seeds)


def _combined(function: Callable[[list[Any]], Any], parts: list[Any]) -> Any:
    """The arrays of all parts, put together one by one; names and numbers of slots are the same in all."""
    values: dict[str, Any] = {}
    for field in fields(parts[0]):
        found = [getattr(part, field.name) for part in parts]
        if isinstance(found[0], tuple):
            values[field.name] = tuple(_combined(function, list(same)) for same in zip(*found, strict=True))
        elif isinstance(found[0], str | int):
            assert len(set(found)) == 1, (field.name, found)
            values[field.name] = found[0]
        else:
            values[field.name] = function(found)
    return type(parts[0])(**values)


def summary(sums: Sums) -> dict[str, Any]:
    """Means of one set of weights (or of several seeds pooled).

    Returns:
        nll and perplexity of the completions; loads: per policy and budget loads_per_token and hit_rate;
        static: per budget the share of the requests that the fixed sets serve (own, shared); to_shared: per
        policy and budget {ratio, low, high} of its loads to those of the one set for all in the same slots,
        which is chosen with hindsight and there before the first token: the bar for a cache.
    """
    nll = float(sums.nll.sum() / sums.tokens.sum())
    return {
        "nll": nll,
        "perplexity": math.exp(min(nll, 700.0)),
        "num_sequences": len(sums.nll),
        "loads": [
            {
                "policy": replay.policy,
                "slots": replay.slots,
                "loads_per_token": per(float(replay.loads.sum()), float(sums.decoded.sum())) or 0.0,
                "hit_rate": hit_rate(float(replay.hits.sum()), float(replay.loads.sum())) or 0.0,
            }
            for replay in sums.replays
        ],
        "static": [
            {
                "slots": sets.slots,
                "own": per(float(sets.own.sum()), float(sums.requests.sum())) or 0.0,
                "shared": per(float(sets.shared.sum()), float(sums.requests.sum())) or 0.0,
            }
            for sets in sums.fixed_sets
        ],
        "to_shared": [
            {"policy": replay.policy, "slots": replay.slots}
            | ratio_of_sums(replay.loads, sums.requests - sets.shared)
            for replay in sums.replays
            for sets in sums.fixed_sets
            if sets.slots == replay.slots
        ],
    }


def compare(tuned: Sums, control: Sums) -> dict[str, Any]:
    """Ratios tuned / control with 95 percent intervals, paired over the sequences.

    Returns:
        perplexity, nll: {ratio, low, high}; loads: the same per policy and budget.
    """
    return {
        "perplexity": perplexity_ratio(tuned.nll, control.nll, control.tokens),
        "nll": ratio_of_sums(tuned.nll, control.nll),
        "loads": [
            {"policy": own.policy, "slots": own.slots}
            | ratio_of_sums(own.loads, control.replay(own.policy, own.slots).loads)
            for own in tuned.replays
        ],
    }
