"""Rows of the simulator: what policies load on the routing of held-out rows, teacher-forced.

Published policies that our pager does not have stand beside our own on the same trace, so that like is
compared with like. They have no seconds: a cache's hits are no speed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from melinoe.data.rows import Row
from melinoe.measure.trace import trace
from melinoe.routing.calls import DECODE
from melinoe.routing.simulate import simulate

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


def simulated_rows(model: str | Path, rows: list[Row], count: int, slots: int) -> list[dict[str, Any]]:
    """Every policy of LABELS with as many slots per layer as ours has in the race.

    The static frequency is counted on other rows than those that are replayed.

    Args:
        rows: the first `count` are replayed, as many after them are counted.
    """
    recorded = trace(model, rows[:count], progress=False)
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
