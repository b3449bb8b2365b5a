"""Replays a trace: what a cache of so many slots would have loaded, under any policy.

The policies are the very objects that run on the device, so a number from here is the number of the
device (same hits, misses and evictions). Three rows are bounds rather than policies: `belady` sees the
future of every request, `static-oracle` knows the best fixed set of each sequence, `static-global` keeps
one fixed set for all. Long traces are replayed by twins of the policies' objects (compiled.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.errors import MelinoeError
from melinoe.routing import compiled
from melinoe.routing.calls import hit_rate, per
from melinoe.routing.policies import (
    DECODE,
    POLICIES,
    Call,
    Load,
    Policy,
    Static,
    Strength,
    make_policy,
    mean_strength,
)
from melinoe.routing.published import PUBLISHED
from melinoe.routing.trace import Trace, as_trace

BOUNDS = ("belady", "static-oracle", "static-global")
NEVER = 2**40  # a call that does not come


def next_uses(trace: Trace, layer: int) -> list[tuple[list[int], list[int]]]:
    """Per call: the experts that a layer is asked for, and for each the next call that asks for it again."""
    num_calls, calls = trace.num_calls, np.repeat(np.arange(trace.num_calls), np.diff(trace.call_offsets))
    chosen = trace.indices[:, layer].astype(np.int64)
    pairs = np.unique(chosen * num_calls + calls[:, None])  # by expert, then by call
    experts, at = pairs // num_calls, pairs % num_calls
    again = np.full(len(pairs), NEVER)
    again[:-1] = np.where(experts[1:] == experts[:-1], at[1:], NEVER)
    order = np.argsort(at, kind="stable")
    cuts = np.searchsorted(at[order], np.arange(num_calls + 1))
    experts, again = experts[order].tolist(), again[order].tolist()
    return [(experts[a:b], again[a:b]) for a, b in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)]


class Belady(Policy):
    """Keeps what is asked again soonest: the most hits that loading on demand allows (it never preloads).

    It may even give up an expert of the same call, once that is served; no other policy may.
    """

    name = "belady"

    def __init__(self, trace: Trace, slots: int) -> None:
        self.next_uses = [next_uses(trace, layer) for layer in range(trace.num_layers)]
        self.position = [0] * trace.num_layers
        super().__init__(trace.num_layers, trace.num_experts, slots)

    def reset(self) -> None:
        super().reset()  # the position stays: the trace goes on
        self.soonest = [[-float(NEVER)] * self.num_experts for _ in range(self.num_layers)]

    def observe(self, layer: int, call: Call, asked: list[int]) -> None:
        soonest = self.soonest[layer]
        for expert, again in zip(*self.next_uses[layer][self.position[layer]], strict=True):
            if expert < self.num_experts:
                soonest[expert] = -again
        self.position[layer] += 1

    def worth(self, layer: int) -> list[float]:
        return self.soonest[layer]

    def _replace(self, layer: int, asked: list[int], misses: list[int]) -> list[Load]:
        return self._fill(layer, asked, misses)[0]


class _Replay:
    """One policy at one number of slots, and what it did, request by request."""

    columns = (
        "hits", "loads", "prefill_hits", "prefill_loads", "preload_loads", "evictions", "preloads_used"
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        slots: int,
        policy: Policy,
        scores: np.ndarray | None,
        strength: Strength | Sequence[Strength] | None,
        carry_over: bool,
    ) -> None:
        self.name, self.slots, self.policy = name, slots, policy
        self.scores, self.strength, self.carry_over = scores, strength, carry_over
        self.rows: list[list[int]] = []
        self.preloaded: set[tuple[int, int]] = set()  # and not asked for since

    def begin(self, sequences: np.ndarray) -> None:
        if not self.carry_over:
            self.policy.reset()
            self.preloaded.clear()
        scores = None if self.scores is None else self.scores[sequences].mean(0)
        strength = self.strength
        if isinstance(strength, Sequence):
            strength = mean_strength([strength[one] for one in sequences])
        self.policy.begin(scores, strength)
        self.rows.append([0] * len(self.columns))

    def request(self, layer: int, call: Call) -> None:
        decision = self.policy.request(layer, call)
        row = self.rows[-1]
        loads, evictions = len(decision.loads), 0
        if self.preloaded:
            used = self.preloaded.intersection([(layer, expert) for expert in decision.hits])
            row[6] += len(used)
            self.preloaded -= used
        for load in decision.loads:
            if load.victim is not None:
                evictions += 1
                self.preloaded.discard((layer, load.victim))
        if call.phase == DECODE:
            row[0] += len(decision.hits)
            row[1] += loads
        else:
            evictions += sum(load.victim is not None for load in decision.preloads)
            row[2] += len(decision.hits)
            row[3] += loads
            row[4] += len(decision.preloads)
            self.preloaded.update((layer, load.expert) for load in decision.preloads)
        row[5] += evictions

    def result(self, decoded: np.ndarray, prompt: np.ndarray, per_sequence: bool) -> dict[str, Any]:
        """Args: decoded, prompt: tokens per request."""
        columns = np.array(self.rows).reshape(-1, len(self.columns)).T
        sums = dict(zip(self.columns, columns.sum(1).tolist(), strict=True))
        tokens, requests = int(decoded.sum()), len(decoded)
        loads = sums["loads"] + sums["prefill_loads"] + sums["preload_loads"]
        result: dict[str, Any] = {
            "policy": self.name,
            "slots": self.slots,
            "prediction": self.scores is not None and self.policy.uses_prediction,
            "hit_rate": hit_rate(sums["hits"], sums["loads"]) or 0.0,
            "loads_per_token": per(sums["loads"], tokens) or 0.0,
            "prefill_loads_per_token": per(sums["prefill_loads"], int(prompt.sum())) or 0.0,
            "prefill_loads_per_sequence": per(sums["prefill_loads"], requests) or 0.0,
            "preload_loads_per_sequence": per(sums["preload_loads"], requests) or 0.0,
            "wasted_preloads_per_sequence": per(sums["preload_loads"] - sums["preloads_used"], requests)
            or 0.0,
            "total_loads_per_token": per(loads, tokens) or 0.0,
            "evictions": sums["evictions"],
            "num_tokens": tokens,
            "num_sequences": requests,
        }
        if per_sequence:
            result["per_sequence"] = dict(zip(self.columns, columns, strict=True)) | {"tokens": decoded}
        return result


def _replay(
    trace: Trace,
    name: str,
    slots: int,
    scores: np.ndarray | None,
    strength: Strength | Sequence[Strength] | None,
    carry_over: bool,
) -> _Replay:
    policy: Policy
    if name == "belady":
        policy, scores = Belady(trace, slots), None
    elif name in BOUNDS:
        policy, scores = Static(trace.num_layers, trace.num_experts, slots), trace.frequencies(DECODE)
        if name == "static-global":
            counts = trace.request_counts(DECODE).sum(0)
            scores = np.broadcast_to(counts / max(1, trace.decoded.sum()), scores.shape)
    elif name in PUBLISHED:
        policy, scores = PUBLISHED[name](trace.num_layers, trace.num_experts, slots), None
    else:
        policy = make_policy(name, trace.num_layers, trace.num_experts, slots)
    return _Replay(name, slots, policy, scores, strength, carry_over)


def _names(policy: str | Iterable[str]) -> list[str]:
    names = re.split(r"[,\s]+", policy.strip()) if isinstance(policy, str) else list(policy)
    for name in names:
        if not any(name in known for known in (POLICIES, BOUNDS, PUBLISHED)):
            allowed = ", ".join([*sorted(POLICIES), *BOUNDS, *PUBLISHED])
            raise MelinoeError("unknown policy", got=repr(name), allowed=allowed)
    return names


def _slots(slots: int | Iterable[int]) -> list[int]:
    sizes = [slots] if isinstance(slots, int) else list(slots)
    if not sizes or min(sizes) < 0:
        raise MelinoeError("not a number of slots", got=sizes, allowed="0 or more slots per layer")
    return sizes


def _ask(trace: Trace, replays: list[_Replay]) -> None:
    """Asks the policies' own objects, call by call."""
    previous = -1
    for position, layer, call in trace.calls():
        if position != previous:
            previous = position
            if trace.begins[position]:
                tokens = slice(trace.call_offsets[position], trace.call_offsets[position + 1])
                for replay in replays:
                    replay.begin(np.unique(trace.sequence[tokens]))
        for replay in replays:
            replay.request(layer, call)


def simulate(
    trace: Trace | str | Path,
    policy: str | Iterable[str] = "decay,lru,belady",
    slots: int | Iterable[int] = 8,
    carry_over: bool = False,
    predictor_scores: np.ndarray | None = None,
    strength: Strength | Sequence[Strength] | None = None,
    per_sequence: bool = False,
) -> dict[str, Any]:
    """Replays a trace through policies at one or more sizes.

    A request is a sequence (or the batch of sequences that one prefill call starts). Its slots are empty at
    first; with `carry_over` they and the counts are those that the request before left.

    Args:
        trace: a Trace or its file.
        policy: names, a list or with commas: decay, lru, lfu, static; of others (published.py) global-lru,
            least-stale, prefill-mass; bounds: belady, static-oracle, static-global.
        slots: per layer; one number or several.
        carry_over: requests follow each other in a warm cache.
        predictor_scores: [S, L, E] predicted requests per decoded token, for policies that use prediction.
        strength: what the predictions are worth (`Predictor.strength`), one for all or one for each sequence;
            None: the policy's default.
        per_sequence: adds the counts of every request as arrays, for a comparison in pairs
            (melinoe.measure.intervals).

    Returns:
        {"trace": {model, sticky, adapter (both where the trace knows), made_by: all three in words},
        "results": [...]}, for every policy at every size:
        hit_rate: decode; distinct experts of a call that were resident before it, of all that it asked for.
        loads_per_token: expert records read while decoding, per decoded token, summed over layers.
        prefill_loads_per_token, prefill_loads_per_sequence: read by prompts, per prompt token and request.
        preload_loads_per_sequence: predicted records that the prompt did not ask for, per request.
        wasted_preloads_per_sequence: those of them that left, or were there at the end, without being asked
        for.
        total_loads_per_token: all three, per decoded token.
        evictions: residents that were replaced, all phases. num_tokens: decoded. num_sequences: requests.

    Raises:
        MelinoeError: not a trace, an unknown policy, a wrong number of slots, scores of another shape.
    """
    names, sizes, trace = _names(policy), _slots(slots), as_trace(trace)
    expected = (trace.num_sequences, trace.num_layers, trace.num_experts)
    if predictor_scores is not None and predictor_scores.shape != expected:
        raise MelinoeError(
            "predicted scores do not fit the trace", got=predictor_scores.shape, allowed=expected
        )
    replays = [
        _replay(trace, name, size, predictor_scores, strength, carry_over) for name in names for size in sizes
    ]
    long = trace.num_calls * trace.num_layers >= compiled.LONG
    by_object = []
    for replay in replays:
        if long and compiled.can_replay(replay.policy, replay.scores is not None):
            # without a prediction, so nothing was preloaded
            found = compiled.replay(trace, replay.policy, carry_over)
            replay.rows = np.pad(found, ((0, 0), (0, len(replay.columns) - found.shape[1]))).tolist()
        else:
            by_object.append(replay)
    if by_object:
        _ask(trace, by_object)
    request = np.repeat(np.cumsum(trace.begins) - 1, np.diff(trace.call_offsets))  # [N]
    num_requests = int(trace.begins.sum())
    decoded = np.bincount(request[trace.decoded], minlength=num_requests)
    prompt = np.bincount(request[trace.valid & ~trace.decoded], minlength=num_requests)
    known: dict[str, Any] = {
        name: trace.origin[name] for name in ("sticky", "adapter") if name in trace.origin
    }
    told: dict[str, Any] = {"model": trace.model, **known, "made_by": trace.made_by}
    return {"trace": told, "results": [replay.result(decoded, prompt, per_sequence) for replay in replays]}
