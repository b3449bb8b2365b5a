"""`melinoe plan`: what a budget buys, before any weight is loaded.

What it is made of is in facts.py; here it is divided, so that another budget of a model that was planned a
while ago needs neither torch nor transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from melinoe.config import format_bytes, format_rate
from melinoe.models.folder import resolve_model
from melinoe.runtime.division import divide, given_bytes, one_of
from melinoe.runtime.facts import Facts, keep, kept, place_of
from melinoe.runtime.forecast import advice, forecast
from melinoe.runtime.speed import Machine, parse_machine

HIT_RATES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


def plan(
    source: str | Path,
    memory: int | str | None = None,
    slots: int | None = None,
    *,
    context: int | None = None,
    batch: int = 1,
    device: str = "cpu",
    slots_format: str | None = None,
    measure_seconds: float = 1.0,
    speeds: bool = False,
    machine: str | Machine | None = None,
    remembered: bool | None = None,
    prepare: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Where the bytes of a budget go, and how fast decoding can be at best.

    Args:
        source: a store or a checkpoint. Its config is read, and of a store or a checkpoint that can be read
            in place some experts, to measure. The weights of a Hub id are not fetched.
        memory, slots: as for `melinoe.load`.
        context, batch: tokens of KV cache to set aside for a sequence, and sequences at once.
        slots_format: packed or expanded, as for `melinoe.load`.
        measure_seconds: how long at most to read records for the bandwidth; 0: not at all.
        speeds: predict tokens a second of every format and policy, too; takes a second or two.
        machine: another one than this, such as `gpu=24GiB,ram=64GiB,read=7GB/s,bus=25GB/s` (speed.py): its
            memory is the budget where none is given, nothing is measured, and the speeds are its own.
        remembered: what was counted and measured within the last hour will do (facts.py); False: it is done
            anew, and remembered; None: neither.
        prepare: called before torch is needed, if it is.

    Returns:
        {"budget": {...}, "num_experts", "experts_per_token", "record_bytes", "records_per_token",
        "bytes_per_token", "bandwidth" (bytes per second, or None), "not_measured" (why there is no bandwidth,
        or None), "ceiling_tokens_per_second": {hit rate: tok/s}, "age_seconds" (of what was remembered)}.
        The ceiling counts reading alone: bytes that must be read for a token over the bandwidth.
        With speeds also "speeds", rows of forecast.py, and "advice", sentences.

    Raises:
        MelinoeError: no such model, a dense one, memory and slots both, or a budget that is too small.
    """
    one_of(memory, slots)
    if memory is not None:
        given_bytes(memory, None)  # refuses what is no size before anything is measured
    there = parse_machine(machine) if isinstance(machine, str) else machine
    if there is not None:
        measure_seconds, speeds = 0, True
        memory = there.budget_bytes if memory is None and slots is None else memory
    asked: dict[str, Any] = {
        "context": context,
        "batch": batch,
        "device": device,
        "slots_format": slots_format,
        "measure_seconds": measure_seconds,
        "formats": speeds,
        "rates": speeds and there is None,
    }
    place = _place(source, asked) if remembered is not None else None
    facts = kept(place) if place is not None and remembered else None
    if facts is None:
        if prepare is not None:
            prepare()
        from melinoe.runtime.facts_of_model import facts_of

        facts = facts_of(source, **asked, remembered=remembered)
        if place is not None:
            keep(place, facts)
    return _divided(facts, memory, slots, device, speeds, there)


def _place(source: str | Path, asked: dict[str, Any]) -> Path | None:
    """Where facts are kept; None where they are not: of what the Hub has, and of accelerators."""
    folder = resolve_model(source)
    return place_of(folder, asked) if isinstance(folder, Path) and asked["device"] == "cpu" else None


def _divided(
    facts: Facts,
    memory: int | str | None,
    slots: int | None,
    device: str,
    speeds: bool,
    machine: Machine | None,
) -> dict[str, Any]:
    where = None
    if device != "cpu":
        from melinoe.machine import usable_device

        where = usable_device(device)
    derived = divide(facts.needs, facts.records, memory, slots, buffer_bytes=facts.buffer_bytes, device=where)

    def slots_of(sizes: list[tuple[int, int]]) -> int:
        return divide(facts.needs, sizes, derived.total_bytes, device=where).slots

    rows = forecast(facts, slots_of, machine) if speeds else []
    shape, bandwidth = facts.shape, facts.bandwidth
    per_token = shape.top_k * sum(facts.read_bytes)
    ceilings = {rate: bandwidth / (per_token * (1 - rate)) for rate in HIT_RATES} if bandwidth else {}
    return {
        "budget": {
            **vars(derived),
            "total_bytes": derived.total_bytes,
            "pass_tokens": derived.pass_tokens,
            "text": str(derived),
        },
        "num_experts": max(count for count, _ in facts.records),
        "experts_per_token": shape.top_k,
        "record_bytes": max(facts.read_bytes),
        "slot_bytes": max(size for _, size in facts.records),
        "records_per_token": shape.top_k * len(facts.records),
        "bytes_per_token": per_token,
        "bandwidth": bandwidth,
        "not_measured": facts.not_measured,
        "ceiling_tokens_per_second": ceilings,
        "age_seconds": round(max(0.0, time.time() - facts.taken)),
        **({"speeds": rows, "advice": advice(rows, shape.num_experts)} if speeds else {}),
    }


def deployed_slots(source: str | Path, memory: int | str, device: str = "cpu") -> int:
    """C for tuning: the records per layer that `generate --memory` will have, at least the K of one token.

    Raises:
        MelinoeError: as for `plan`.
    """
    found = plan(source, memory, device=device, measure_seconds=0)
    return max(int(found["budget"]["slots"]), int(found["experts_per_token"]))


def describe(result: dict[str, Any]) -> str:
    """The plan as people read it."""
    slots, experts = result["budget"]["slots"], result["num_experts"]
    lines = [
        result["budget"]["text"],
        f"{slots} of {experts} experts of each layer in memory; a token asks for"
        f" {result['records_per_token']} records of {format_bytes(result['record_bytes'])},"
        f" {format_bytes(result['bytes_per_token'])} if none is there",
    ]
    if result["bandwidth"]:
        lines.append(
            f"reading reaches {format_bytes(result['bandwidth'])}/s; what reading alone allows, by hit rate:"
        )
        lines += [
            f"  {rate:4.0%} hits: {format_rate(speed):>8} tok/s"
            for rate, speed in result["ceiling_tokens_per_second"].items()
        ]
    else:
        lines.append(
            f"how fast experts can be read was not measured: {result['not_measured'] or 'not asked for'}"
        )
    if result.get("speeds"):
        lines.append("predicted decoding, tok/s (and between which it lies, as routing is even or narrow):")
        lines += [
            f"  {row['format']:<5} {row['policy']:<9} {row['slots']:>4} slots"
            f" {format_rate(row['tokens_per_second']):>8}"
            f" ({format_rate(row['low'])} to {format_rate(row['high'])})"
            for row in result["speeds"]
        ]
        lines += result["advice"]
    if result["age_seconds"] >= 60:
        lines.append(
            f"(counted and measured {result['age_seconds'] // 60} minutes ago; --anew does it again)"
        )
    return "\n".join(lines)
