"""From repeated runs to the numbers of a row: medians with their range, ranks, and what is too noisy to rank.

A repeat is one process of every row, close together in time. So rows are compared in pairs, repeat by
repeat: other work on the machine meets both. Two rows are told apart where one was faster in every repeat
(in nine of ten where there are ten or more); rows that cannot be told apart share a rank.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

SPEED = "generation_tokens_per_second"
NOISY = 0.5  # range over median, above which a row is marked as too noisy to rank
CLEAR = 0.9  # share of repeats in which the faster of two must be faster


def percentile(values: list[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def of_repeat(run: dict[str, Any]) -> dict[str, Any]:
    """What one process measured: ratios of sums over its requests."""
    requests = run["requests"]
    fed = sum(len(one["tokens"]) - 1 for one in requests)
    seconds = sum(one["times"][-1] - one["times"][0] for one in requests)
    result: dict[str, Any] = {
        SPEED: fed / seconds,
        "ttft_seconds": median(one["times"][0] for one in requests),
        "seconds_per_request": sum(one["times"][-1] for one in requests) / len(requests),
        "generated_tokens": sum(len(one["tokens"]) for one in requests),
        "peak_memory_bytes": run.get("peak_bytes"),
    }
    counts = [one["counts"] for one in requests]
    for name in ("prefill_bytes", "preload_bytes", "prefill_loads", "preload_loads"):
        if name in counts[0]:
            result[f"{name}_per_request"] = sum(one[name] for one in counts) / len(counts)
    for name in ("decode_bytes", "decode_loads"):
        if name in counts[0]:
            result[f"{name}_per_token"] = sum(one[name] for one in counts) / fed
    if "decode_hits" in counts[0]:
        asked = sum(one["decode_requests"] for one in counts)
        result["hit_rate"] = sum(one["decode_hits"] for one in counts) / asked if asked else None
        result["stalled_seconds_per_request"] = sum(one["stalled_seconds"] for one in counts) / len(counts)
    busy = sum(one.get("read_seconds", 0.0) for one in counts)
    if busy:
        reached = sum(one["read_bytes"] for one in counts) / busy
        # the faster of the bare reader and of what the row itself was seen to reach: both were possible here
        bare = max(reached, *(one["bare_bytes_per_second"] for one in counts))
        per_token = result["decode_bytes_per_token"]
        result |= {
            "read_bytes_per_second": reached,
            "bare_bytes_per_second": bare,
            "bandwidth_share": reached / bare,
            "read_ceiling_tokens_per_second": bare / per_token if per_token else None,
        }
    return result


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several repeats: medians, the range of the speed, and times of all tokens together."""
    each = [of_repeat(run) for run in runs]
    steps = [
        later - earlier
        for run in runs
        for one in run["requests"]
        for earlier, later in zip(one["times"][:-1], one["times"][1:], strict=True)
    ]
    result: dict[str, Any] = {}
    for name in each[0]:
        values = [one[name] for one in each if one[name] is not None]
        result[name] = median(values) if values else None
    speeds = [one[SPEED] for one in each]
    return result | {
        "repeats": len(runs),
        "speeds": speeds,
        f"{SPEED}_range": [min(speeds), max(speeds)],
        "token_seconds_p50": percentile(steps, 0.5),
        "token_seconds_p99": percentile(steps, 0.99),
        "noisy": len(speeds) > 1 and (max(speeds) - min(speeds)) / median(speeds) > NOISY,
        "slots": runs[0].get("slots"),
    }


def told_apart(faster: list[float], slower: list[float]) -> bool:
    """Whether the first was faster in nearly every repeat; never so of a single one."""
    pairs = list(zip(faster, slower, strict=False))
    wins = sum(a > b for a, b in pairs)
    return len(pairs) > 1 and wins >= math.ceil(CLEAR * len(pairs))


def rank(rows: list[dict[str, Any]]) -> None:
    """Writes `rank` into rows that have speeds: 1 is fastest; who cannot be told apart shares one.

    A row opens a new rank where every row of the rank above was faster than it.
    """
    measured = sorted((row for row in rows if row.get("speeds")), key=lambda row: -row[SPEED])
    group: list[dict[str, Any]] = []
    for position, row in enumerate(measured):
        if group and all(told_apart(one["speeds"], row["speeds"]) for one in group):
            group = []
        group.append(row)
        row["rank"] = position + 1 if len(group) == 1 else group[0]["rank"]
