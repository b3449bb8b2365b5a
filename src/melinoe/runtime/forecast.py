"""Which format and policy decode fastest inside a budget: the rows of `melinoe plan` that predict.

From the shape of the model, and either what was measured on this machine (facts_of_model.py) or what a
machine that is not here is said to reach (speed.py). No tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from melinoe.config import format_rate
from melinoe.errors import MelinoeError
from melinoe.runtime.facts import Facts
from melinoe.runtime.speed import Machine, predict

POLICIES = ("decay", "lru", "lfu")
NO_CACHE = "no cache"
LITTLE = 1.1  # times faster than no cache, up to which a cache does not pay


def forecast(
    facts: Facts, slots_of: Callable[[list[tuple[int, int]]], int], machine: Machine | None
) -> list[dict[str, Any]]:
    """Rows {"format", "policy", "slots", "hit_rate", "tokens_per_second", "low", "high"}, fastest first.

    Each has "shape" and "rates" too, what it was made of.

    Args:
        slots_of: how many slots per layer a budget has for (experts, bytes of a record) of each layer.
        machine: instead of this one, of which nothing can be said where nothing was measured.
    """
    rows = []
    for format, sizes in facts.formats.items():
        try:
            slots = slots_of(sizes)
        except MelinoeError:  # not one slot in every layer
            slots = 0
        largest, expert_bytes = max(size for _, size in sizes), sum(count * size for count, size in sizes)
        if machine is not None:
            rates = machine.rates(largest, expert_bytes, facts.shape.top_k)
        elif format in facts.rates:
            rates = facts.rates[format]
        else:
            return []
        policies = [(NO_CACHE, 0), *((policy, slots) for policy in POLICIES if slots)]
        for policy, held in policies:
            found = predict(facts.shape, rates, "lru" if policy == NO_CACHE else policy, held)
            made_of = {"shape": vars(facts.shape), "rates": vars(rates)}
            rows.append({"format": format, "policy": policy, "slots": held, **vars(found), **made_of})
    return sorted(rows, key=lambda row: -row["tokens_per_second"])


def advice(rows: list[dict[str, Any]], num_experts: int) -> list[str]:
    """What the rows say, for people: the fastest, and whether a cache pays."""
    if not rows:
        return []
    best = rows[0]
    lines = [
        f"fastest here: {best['format']}, {best['policy']}: {format_rate(best['tokens_per_second'])} tok/s"
        f" ({format_rate(best['low'])} to {format_rate(best['high'])})"
    ]
    bare = next(row for row in rows if row["format"] == best["format"] and row["policy"] == NO_CACHE)
    gain = best["tokens_per_second"] / bare["tokens_per_second"]
    if best["policy"] == NO_CACHE or gain < LITTLE:
        lines.append("a cache does not pay here: reading is hidden behind the arithmetic, or nothing fits")
    elif best["slots"] >= num_experts:
        lines.append(f"every expert fits as {best['format']}: nothing is read after the first use")
    else:
        lines.append(f"the cache makes it {gain:.1f} times as fast as none")
    return lines
