"""What `melinoe plan` says before the rows of ours run, and by how much it was wrong."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import torch

from melinoe.benchmark.entries import BASE, OURS
from melinoe.benchmark.summary import SPEED
from melinoe.files import write_json
from melinoe.runtime.forecast import NO_CACHE
from melinoe.runtime.plan import plan
from melinoe.runtime.speed import Rates, Shape, token_seconds

# what Python, torch and transformers have when a model is opened, as `melinoe.plan(model)` says of a process
# (338 MiB); what they take beyond it is part of a budget
INTERPRETER_BYTES = 344 * 2**20


def budget_of(limit_bytes: int) -> int:
    """What ours may take of a limit: what the process has before a model is opened counts too."""
    return limit_bytes - INTERPRETER_BYTES


def predict(file: Path, store: Path, limit_bytes: int, context: int, threads: int) -> dict[str, Any]:
    """{"format policy": row of `plan`}, read from `file`, where it is written once it has been measured.

    It is asked before each repeat: what else the machine does meets its probes as it meets the rows.
    """
    if not file.is_file():
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = plan(store, budget_of(limit_bytes), context=context, measure_seconds=0, speeds=True)
        finally:
            torch.set_num_threads(before)
        rows = {f"{row['format']} {row['policy']}": row for row in found["speeds"]}
        write_json(file, rows, default=float)
    read: dict[str, Any] = json.loads(file.read_text())
    return read


def prediction_of(row: dict[str, Any], predicted: list[dict[str, Any]]) -> dict[str, Any]:
    """What was predicted for a row of ours on the base's weights: nobody told the plan of a tuning.

    The error has two causes, so it is given without the one of them, too: at the hits that came.

    Args:
        predicted: what `predict` returned before each repeat.
    """
    name = f"{row['precision']} {NO_CACHE if row['slots'] == 0 else row['policy']}"
    found = [one[name] for one in predicted if name in one]
    if row["kind"] != OURS or row["weights"] != BASE or row["predicted"] or not found:
        return {}
    speed = median(one["tokens_per_second"] for one in found)
    at_hits = median(
        1 / token_seconds(Shape(**one["shape"]), Rates(**one["rates"]), row["hit_rate"] or 0.0)
        for one in found
    )
    return {
        "predicted_tokens_per_second": speed,
        "predicted_range": [median(one[end] for one in found) for end in ("low", "high")],
        "predicted_hit_rate": found[0]["hit_rate"],
        "prediction_error": speed / row[SPEED] - 1,
        "prediction_error_at_hits": at_hits / row[SPEED] - 1,
    }
