"""The replay of long traces, compiled: LRU, visit counts and decayed counts without a prediction.

The policy objects of policies.py decide on the device and define what is right; they cost 13 microseconds a
layer and token. This is the same bookkeeping over arrays, compiled by numba, for traces of millions of
tokens: same worth in the same order of floating-point operations, same ties, so the same hits, loads and
evictions (tests/test_compiled.py holds the two against each other). What has no twin here, such as a
prediction with its trust, is replayed by its object.

Without numba, or where a trace is shorter than compiling takes, the objects do all of it.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from melinoe.routing.policies import LFU, LRU, DecayedCounts, Policy

if TYPE_CHECKING:
    from melinoe.routing.trace import Trace

LONG = 200_000  # layer calls, below which the objects are done before the compiler is
RECENCY, COUNTS = 0, 1


def can_replay(policy: Policy, predicted: bool) -> bool:
    """Whether a policy has a twin here; a subclass of ours is a policy of its own and has none."""
    known = type(policy) in (LRU, LFU, DecayedCounts)
    return (
        known and not (predicted and policy.uses_prediction) and importlib.util.find_spec("numba") is not None
    )


def replay(trace: Trace, policy: Policy, carry_over: bool) -> np.ndarray:
    """[R, 6] of every request: hits, loads, prefill hits, prefill loads, preloads (none), evictions.

    Args:
        policy: as `can_replay` allows; it is asked for its parameters, and not changed.
    """
    offsets, ages, valid = trace.call_offsets, trace.ages, trace.valid
    sizes = np.diff(offsets)
    # how many tokens of time each call spans, as `Call.steps` counts them
    spans = np.maximum.reduceat(np.where(valid, ages, -1), offsets[:-1]) + 1 if len(sizes) else sizes
    steps = np.where(sizes == 1, valid[offsets[:-1]], spans).astype(np.int64)
    counts = isinstance(policy, DecayedCounts)
    decays = policy.decays if isinstance(policy, DecayedCounts) else np.ones((2, 1))
    weight = float(policy.weights[1]) if isinstance(policy, DecayedCounts) else 0.0
    oldest = int(ages.max(initial=0))
    # powers by the very expressions of the policy: numpy and a compiler may round them differently
    by_age = np.stack([decay ** np.arange(oldest + 1, dtype=ages.dtype) for decay in decays[:, 0]])
    by_steps = np.ones((2, int(steps.max(initial=0)) + 1))
    for span in np.unique(steps[sizes > 1]).tolist():
        by_steps[:, span] = (decays**span)[:, 0]
    rows = np.zeros((int(trace.begins.sum()), 6), np.int64)
    _kernel()(
        trace.indices, offsets, trace.call_phase, ages, valid, trace.begins, steps,
        COUNTS if counts else RECENCY, policy.may_decline, policy.slots, trace.num_experts,
        decays[:, 0], weight, by_age, by_steps, carry_over, rows,
    )  # fmt: skip
    return rows


@cache
def _kernel() -> Any:
    from numba import njit

    return njit(cache=True, fastmath=False)(_replay)


def _replay(
    indices: np.ndarray,
    offsets: np.ndarray,
    phases: np.ndarray,
    ages: np.ndarray,
    valid: np.ndarray,
    begins: np.ndarray,
    steps: np.ndarray,
    kind: int,
    may_decline: bool,
    slots: int,
    num_experts: int,
    decays: np.ndarray,
    weight: float,
    by_age: np.ndarray,
    by_steps: np.ndarray,
    carry_over: bool,
    rows: np.ndarray,
) -> None:
    """All layers, one after the other; the state of a layer is its counts, its residents and a clock."""
    num_layers, top_k = indices.shape[1], indices.shape[2]
    counts = np.zeros((2, num_experts))
    added = np.zeros((2, num_experts))
    worth = np.zeros(num_experts)
    resident = np.zeros(num_experts, np.bool_)
    asked = np.zeros(num_experts, np.bool_)
    best = np.zeros(num_experts, np.bool_)
    missing = np.zeros(num_experts, np.int64)
    for layer in range(num_layers):
        counts[:] = 0.0
        resident[:] = False
        clock, held, request = 0, 0, -1
        for call in range(len(phases)):
            if begins[call]:
                request += 1
                if not carry_over:
                    counts[:] = 0.0
                    resident[:] = False
                    clock, held = 0, 0
            start, end = offsets[call], offsets[call + 1]
            asked[:] = False
            for token in range(start, end):
                for k in range(top_k):
                    expert = indices[token, layer, k]
                    if expert < num_experts:
                        asked[expert] = True
            # what the call says of the sequence
            if kind == 0:
                clock += steps[call]
                for token in range(start, end):
                    if valid[token]:
                        used = clock - (ages[token] if end - start > 1 else 0)
                        for k in range(top_k):
                            expert = indices[token, layer, k]
                            if expert < num_experts and used > counts[0, expert]:
                                counts[0, expert] = used
            elif end - start == 1:
                if valid[start]:
                    for row in range(2):
                        decay = decays[row]
                        for expert in range(num_experts):
                            counts[row, expert] *= decay
                        for expert in range(num_experts):
                            if asked[expert]:
                                counts[row, expert] += 1.0
            else:
                added[:] = 0.0
                for token in range(start, end):
                    if valid[token]:
                        for k in range(top_k):
                            expert = indices[token, layer, k]
                            if expert < num_experts:
                                for row in range(2):
                                    added[row, expert] += by_age[row, ages[token]]
                for row in range(2):
                    decay = by_steps[row, steps[call]]
                    for expert in range(num_experts):
                        counts[row, expert] = counts[row, expert] * decay + added[row, expert]
            hits = misses = 0
            for expert in range(num_experts):
                if asked[expert]:
                    if resident[expert]:
                        hits += 1
                    else:
                        missing[misses] = expert
                        misses += 1
            prefill = phases[call] == 0
            column = 2 if prefill else 0
            rows[request, column] += hits
            rows[request, column + 1] += misses
            if misses == 0 and not prefill:
                continue
            if kind == 0:
                for expert in range(num_experts):
                    worth[expert] = counts[0, expert]
            else:
                for expert in range(num_experts):
                    worth[expert] = counts[0, expert] + weight * counts[1, expert]
            if prefill:  # the slots end with the best of all that are known
                best[:] = False
                kept = 0
                while kept < slots:
                    found = -1
                    for expert in range(num_experts):
                        known = (resident[expert] or asked[expert]) and not best[expert]
                        if known and (found < 0 or worth[expert] > worth[found]):
                            found = expert
                    if found < 0:
                        break
                    best[found] = True
                    kept += 1
                for expert in range(num_experts):
                    if resident[expert] and not best[expert]:
                        rows[request, 5] += 1
                    resident[expert] = best[expert]
                held = kept
                continue
            for served in range(misses):
                place = served  # the most worth first, then by id
                for other in range(served + 1, misses):
                    if worth[missing[other]] > worth[missing[place]]:
                        place = other
                miss = missing[place]
                for other in range(place, served, -1):  # the others keep their order
                    missing[other] = missing[other - 1]
                if held < slots:
                    held += 1
                    resident[miss] = True
                    continue
                victim = -1
                for expert in range(num_experts):
                    may_leave = resident[expert] and not asked[expert]
                    if may_leave and (victim < 0 or worth[expert] < worth[victim]):
                        victim = expert
                if victim < 0 or (may_decline and worth[miss] <= worth[victim]):
                    continue
                resident[victim] = False
                resident[miss] = True
                rows[request, 5] += 1
