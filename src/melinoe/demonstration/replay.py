"""The recorded routing of the demo, through caches of several sizes.

Teacher-forced: all weights read the same references, so that their loads can be compared in pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from melinoe.measure.intervals import ratio_of_sums
from melinoe.routing.policies import Strength
from melinoe.routing.simulate import simulate
from melinoe.routing.trace import Trace

PREDICTED = "tuned + predictor"
PAIRS = (("tuned", "control"), ("tuned", "base"), ("control", "base"), (PREDICTED, "tuned"))


def replay(
    traces: dict[str, Trace], slots: int, scores: np.ndarray, strength: list[Strength]
) -> dict[str, Any]:
    """Replays every trace at the demo's number of slots and at others.

    Args:
        traces: {base, control, tuned}, of the same rows.
        slots: per layer, of the demo's table.
        scores, strength: what was predicted for the tuned weights, and what it is worth for each of them.

    Returns:
        results: {weights: rows of `simulate`}; pairs: {"a / b": loads of a over those of b, with interval}.
    """
    num_experts = traces["base"].num_experts
    eighths = {max(1, num_experts // 8), 3 * num_experts // 8, num_experts // 2, 3 * num_experts // 4}
    results: dict[str, list[dict[str, Any]]] = {}
    for name, trace in traces.items():
        if name == "tuned":
            results[PREDICTED] = simulate(
                trace, "decay", slots, predictor_scores=scores, strength=strength, per_sequence=True
            )["results"]
        results[name] = simulate(trace, "decay,lru,belady", slots, per_sequence=True)["results"]
        results[name] += simulate(trace, "decay,lru", sorted(eighths - {slots}))["results"]
    pairs = {f"{a} / {b}": _loads_ratio(results[a][0], results[b][0]) for a, b in PAIRS}
    for rows in results.values():
        for row in rows:
            row.pop("per_sequence", None)
    return {"results": results, "pairs": pairs}


def _loads_ratio(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """Loads of a over those of b; the same sequences, so the ratio per token is the same."""
    own, other = a["per_sequence"], b["per_sequence"]
    assert np.array_equal(own["tokens"], other["tokens"]), "the weights were traced on other rows"
    return ratio_of_sums(own["loads"], other["loads"])
