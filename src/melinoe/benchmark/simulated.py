"""Rows of the simulator: what policies load on the routing of held-out rows, teacher-forced.

Published policies that our pager does not have stand beside our own on the same trace, so that like is
compared with like. They have no seconds: a cache's hits are no speed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from melinoe.benchmark.entries import BASE
from melinoe.data.rows import Row
from melinoe.measure.trace import trace
from melinoe.routing.calls import DECODE
from melinoe.routing.simulate import simulate
from melinoe.routing.trace import Trace

LABELS = {
    "lru": ("LRU per layer", "mixtral-offloading, moe-policylang"),
    "lfu": ("visit counts", "MoE-Infinity"),
    "global-lru": ("one global LRU", "FreeToken, arXiv 2608.16157"),
    "least-stale": ("Least-Stale", "SpecMD, arXiv 2602.03921"),
    "prefill-mass": ("prefill mass", "KTransformers, update at prefill"),
    "static": ("static frequency", "KTransformers, llama.cpp placement files"),
    "decay": ("melinoe decay", ""),
    "belady": ("Belady, which sees the future", "a bound"),
}
COLUMNS = ("hit_rate", "loads_per_token", "prefill_loads_per_sequence", "preload_loads_per_sequence")


def by_budget(recorded: Trace) -> list[dict[str, Any]]:
    """Hit rates of LRU, ours and Belady where an eighth to three quarters of the experts are held."""
    sizes = sorted({max(1, recorded.num_experts * part // 8) for part in (1, 2, 3, 4, 6)})
    found = simulate(recorded, "lru,decay,belady", sizes)["results"]
    return [{name: row[name] for name in ("policy", "slots", "hit_rate")} for row in found]


def load_map(recorded: Trace) -> list[list[float]]:
    """[L][E] the share of each layer's decode requests that went to each expert."""
    counts = recorded.request_counts(DECODE).sum(0).astype(np.float64)
    return (counts / np.maximum(counts.sum(1, keepdims=True), 1)).round(5).tolist()


def routing(models: dict[str, Path], rows: list[Row], count: int, slots: int) -> dict[str, dict[str, Any]]:
    """For each of the weights {"by_budget", "map"}; for the base also the rows of the policies."""
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        recorded = trace(model, rows[:count], progress=False)
        found[name] = {"by_budget": by_budget(recorded), "map": load_map(recorded)}
        if name == BASE:
            found[name]["rows"] = simulated_rows(recorded, model, rows, count, slots)
    return found


def simulated_rows(
    recorded: Trace, model: str | Path, rows: list[Row], count: int, slots: int
) -> list[dict[str, Any]]:
    """Every policy of LABELS with as many slots per layer as ours has in the race.

    The static frequency is counted on other rows than those that are replayed.

    Args:
        recorded: of the first `count` rows; as many after them are counted.
    """
    names = [name for name in LABELS if name != "static"]
    found = simulate(recorded, names, slots)["results"]
    counted = trace(model, rows[count : 2 * count] or rows[:count], progress=False).request_counts(DECODE)
    shape = (recorded.num_sequences, recorded.num_layers, recorded.num_experts)
    scores = np.broadcast_to(counted.sum(0).astype(np.float64), shape)
    found += simulate(recorded, "static", slots, predictor_scores=scores)["results"]
    by_name = {row["policy"]: row for row in found}
    return [
        {
            "name": label,
            "policy": name,
            "source": source,
            "simulated": True,
            "slots": slots,
            **{column: by_name[name][column] for column in COLUMNS},
        }
        for name, (label, source) in LABELS.items()
    ]
