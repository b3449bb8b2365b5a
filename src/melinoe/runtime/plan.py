"""`melinoe plan`: what a budget buys, before any weight is loaded."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.config import format_bytes
from melinoe.conversion.checkpoint import Checkpoint
from melinoe.conversion.in_place import NotInPlaceError, index_in_place
from melinoe.conversion.upgrade import open_upgraded
from melinoe.machine import usable_device
from melinoe.models.layers import experts_per_token
from melinoe.paging.disk_reader import DiskReader
from melinoe.paging.expansion import expansion_bytes, slot_records, slots_packed
from melinoe.paging.gather import buffer_bytes
from melinoe.paging.reader import READER_THREADS
from melinoe.paging.slots import RecordBuffer
from melinoe.runtime import budget
from melinoe.runtime.attach import strip
from melinoe.runtime.forecast import Records, advice, forecast
from melinoe.runtime.speed import Machine, parse_machine
from melinoe.store.layout import RecordLayout
from melinoe.store.manifest import Store, is_store

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
) -> dict[str, Any]:
    """Where the bytes of a budget go, and how fast decoding can be at best.

    Args:
        source: a store or a checkpoint. Its config is read, and of a store or a checkpoint that can be read
            in place some experts, to measure. The weights of a Hub id are not fetched.
        memory, slots: as for `melinoe.load`.
        context, batch: tokens of KV cache to set aside for a sequence, and sequences at once.
        slots_format: packed or expanded, as for `melinoe.load`.
        measure_seconds: how long to read records for the bandwidth; 0: not at all.
        speeds: predict tokens a second of every format and policy, too; takes a second or two.
        machine: another one than this, such as `gpu=24GiB,ram=64GiB,read=7GB/s,bus=25GB/s` (speed.py): its
            memory is the budget where none is given, nothing is measured, and the speeds are its own.

    Returns:
        {"budget": {...}, "num_experts", "experts_per_token", "record_bytes", "records_per_token",
        "bytes_per_token", "bandwidth" (bytes per second, or None), "not_measured" (why there is no bandwidth,
        or None), "ceiling_tokens_per_second": {hit rate: tok/s}}.
        The ceiling counts reading alone: bytes that must be read for a token over the bandwidth.
        With speeds also "speeds", rows of forecast.py, and "advice", sentences.

    Raises:
        MelinoeError: no such model, a dense one, or a budget that is too small.
    """
    there = parse_machine(machine) if isinstance(machine, str) else machine
    if there is not None:
        measure_seconds, speeds = 0, True
        memory = there.budget_bytes if memory is None and slots is None else memory
    place = usable_device(device)
    checkpoint = Checkpoint.open(source, weights=False)
    model, experts = checkpoint.model, Records.of(checkpoint.model, checkpoint.layers)
    with tempfile.TemporaryDirectory(prefix="melinoe-plan-") as scratch:
        store, not_measured = _store_of(checkpoint, Path(scratch) / "index")
        bandwidth = None
        if store is not None and measure_seconds > 0:
            bandwidth = record_bandwidth(store, measure_seconds)
    if store is not None:
        packed = slots_packed(store, slots_format, place)
        records, beside = slot_records(store, packed), expansion_bytes(store, packed)
        read_bytes = [layer.layout.record_bytes for layer in store.layers]
    else:
        beside = 0
        records = [
            (layer.num_experts, RecordLayout.of(layer.experts).record_bytes) for layer in checkpoint.layers
        ]
        read_bytes = [size for _, size in records]
    strip(model)
    extra = READER_THREADS * buffer_bytes(store) if store is not None else 0
    derived = budget.derive(
        model,
        records,
        memory,
        slots,
        context=context,
        batch=batch,
        extra_bytes=extra,
        buffer_bytes=beside,
        device=place,
    )

    def slots_of(sizes: list[tuple[int, int]]) -> int:
        return budget.derive(
            model, sizes, derived.total_bytes, context=context, batch=batch, extra_bytes=extra, device=place
        ).slots

    rows: list[dict[str, Any]] = []
    if speeds:
        files = sorted(checkpoint.folder.rglob("*.safetensors"))
        rows = forecast(model, experts, files, slots_of, there)
    top_k = experts_per_token(model)
    per_token = top_k * sum(read_bytes)
    ceilings = {rate: bandwidth / (per_token * (1 - rate)) for rate in HIT_RATES} if bandwidth else {}
    return {
        "budget": {
            **vars(derived),
            "total_bytes": derived.total_bytes,
            "pass_tokens": derived.pass_tokens,
            "text": str(derived),
        },
        "num_experts": max(count for count, _ in records),
        "experts_per_token": top_k,
        "record_bytes": max(read_bytes),
        "slot_bytes": max(size for _, size in records),
        "records_per_token": top_k * len(records),
        "bytes_per_token": per_token,
        "bandwidth": bandwidth,
        "not_measured": not_measured,
        "ceiling_tokens_per_second": ceilings,
        **({"speeds": rows, "advice": advice(rows, max(count for count, _ in records))} if speeds else {}),
    }


def deployed_slots(source: str | Path, memory: int | str, device: str = "cpu") -> int:
    """C for tuning: the records per layer that `generate --memory` will have, at least the K of one token.

    Raises:
        MelinoeError: as for `plan`.
    """
    found = plan(source, memory, device=device, measure_seconds=0)
    return max(int(found["budget"]["slots"]), int(found["experts_per_token"]))


def _store_of(checkpoint: Checkpoint, scratch: Path) -> tuple[Store | None, str | None]:
    """The store of a model (an index of a checkpoint is made in `scratch`), or None and why there is none."""
    if is_store(checkpoint.folder):
        return open_upgraded(checkpoint.folder), None
    if not any(checkpoint.folder.rglob("*.safetensors")):
        return None, "its weights are not here"
    try:
        return index_in_place(checkpoint, scratch), None
    except NotInPlaceError as reason:
        return None, str(reason)


def record_bandwidth(
    store: Store, seconds: float = 2.0, seed: int = 0, group_sizes: Sequence[int] = (READER_THREADS,)
) -> float:
    """Bytes per second that a bare reader reaches with the pager's pattern: random records, same threads.

    Args:
        group_sizes: how many records are asked for together, in turn: the misses of a layer.
    """
    reader = DiskReader(store)
    buffer = RecordBuffer(max(group_sizes), store.max_record_bytes)
    generator, sizes = np.random.default_rng(seed), itertools.cycle(group_sizes)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        layer = int(generator.integers(len(store.layers)))
        length = store.layers[layer].layout.record_bytes
        experts = generator.integers(store.layers[layer].num_experts, size=next(sizes))
        futures = [reader.read(layer, int(e), buffer.record(i, length)) for i, e in enumerate(experts)]
        for future in futures:
            future.result()
    bandwidth = reader.bytes_read / reader.busy_seconds
    reader.close()
    return bandwidth


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
        lines.append(f"reading reaches {format_bytes(result['bandwidth'])}/s; at best, by hit rate:")
        lines += [
            f"  {rate:4.0%} hits: {speed:8.1f} tok/s"
            for rate, speed in result["ceiling_tokens_per_second"].items()
        ]
    else:
        lines.append(
            f"how fast experts can be read was not measured: {result['not_measured'] or 'not asked for'}"
        )
    if result.get("speeds"):
        lines.append("predicted decoding, tok/s (and between which it lies, as routing is even or narrow):")
        lines += [
            f"  {row['format']:<5} {row['policy']:<9} {row['slots']:>4} slots {row['tokens_per_second']:8.1f}"
            f" ({row['low']:.1f} to {row['high']:.1f})"
            for row in result["speeds"]
        ]
        lines += result["advice"]
    return "\n".join(lines)
