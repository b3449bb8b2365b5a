"""Which format and policy decode fastest inside a budget: the rows of `melinoe plan` that predict.

From the index alone: the shape of the model, and either what was measured on this machine in a second
(probe.py) or what a machine that is not here is said to reach (speed.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from melinoe.errors import MelinoeError
from melinoe.models.layers import MoeLayer, experts_per_token
from melinoe.runtime import probe
from melinoe.runtime.speed import Machine, Rates, Shape, hit_rate, predict
from melinoe.store.layout import RecordLayout
from melinoe.store.packing import FORMATS, packing_of

POLICIES = ("decay", "lru", "lfu")
NO_CACHE = "no cache"
LITTLE = 1.1  # times faster than no cache, up to which a cache does not pay


@dataclass(frozen=True)
class Records:
    """The experts of a model, before they are taken out of it. layouts: of each layer, in its own dtype."""

    layouts: tuple[RecordLayout, ...]
    num_experts: tuple[int, ...]
    transposed: bool

    @classmethod
    def of(cls, layers: list[MoeLayer]) -> Records:
        return cls(
            tuple(RecordLayout.of(layer.experts) for layer in layers),
            tuple(layer.num_experts for layer in layers),
            bool(layers[0].experts.is_transposed),
        )

    def in_format(self, format: str) -> list[tuple[int, int]]:
        """(experts, bytes of a record) of each layer in a store format."""
        sizes = []
        for layout in self.layouts:
            packing = packing_of(format, layout, self.transposed)
            sizes.append((layout if packing is None else packing.record_layout()).record_bytes)
        return list(zip(self.num_experts, sizes, strict=True))


def dense_bytes(model: nn.Module) -> int:
    """Weights that every token multiplies by: all but experts, which are out, and embeddings looked up."""
    everything = sum(parameter.nbytes for parameter in model.parameters())
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    output = model.get_output_embeddings()  # type: ignore[operator]
    tied = output is not None and output.weight is embeddings
    return int(everything if tied else everything - embeddings.nbytes)


def forecast(
    model: nn.Module,
    records: Records,
    files: list[Path],
    slots_of: Callable[[list[tuple[int, int]]], int],
    machine: Machine | None,
) -> list[dict[str, Any]]:
    """Rows {"format", "policy", "slots", "hit_rate", "tokens_per_second", "low", "high"}, fastest first.

    Args:
        model: without its experts, on the meta device.
        files: of the model, to measure reading with; none: nothing can be said of this machine.
        slots_of: how many slots per layer a budget has for (experts, bytes of a record) of each layer.
        machine: instead of this one.
    """
    shape = Shape(
        len(records.layouts), max(records.num_experts), experts_per_token(model), dense_bytes(model)
    )
    rows = []
    for format in FORMATS:
        sizes = records.in_format(format)
        try:
            slots = slots_of(sizes)
        except MelinoeError:  # not one slot in every layer
            slots = 0
        rates = _rates(model, records, sizes, format, files, shape, slots, machine)
        if rates is None:
            return []
        policies = [(NO_CACHE, 0), *((policy, slots) for policy in POLICIES if slots)]
        for policy, held in policies:
            found = predict(shape, rates, "lru" if policy == NO_CACHE else policy, held)
            rows.append({"format": format, "policy": policy, "slots": held, **vars(found)})
    return sorted(rows, key=lambda row: -row["tokens_per_second"])


def _rates(
    model: nn.Module,
    records: Records,
    sizes: list[tuple[int, int]],
    format: str,
    files: list[Path],
    shape: Shape,
    slots: int,
    machine: Machine | None,
) -> Rates | None:
    largest = max(size for _, size in sizes)
    if machine is not None:
        return machine.rates(largest, sum(count * size for count, size in sizes))
    misses = round(shape.top_k * (1 - hit_rate("decay", slots, shape.num_experts)))
    read = probe.record_seconds(files, largest, max(1, misses))
    if read is None:
        return None
    hidden = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]
    return Rates(
        probe.layer_seconds(),
        probe.dense_bytes_per_second(hidden, hidden, next(model.parameters()).dtype),
        probe.expert_seconds(records.layouts[0], records.transposed, format),
        read,
    )


def advice(rows: list[dict[str, Any]], num_experts: int) -> list[str]:
    """What the rows say, for people: the fastest, and whether a cache pays."""
    if not rows:
        return []
    best = rows[0]
    lines = [
        f"fastest here: {best['format']}, {best['policy']}: {best['tokens_per_second']:.1f} tok/s"
        f" ({best['low']:.1f} to {best['high']:.1f})"
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
