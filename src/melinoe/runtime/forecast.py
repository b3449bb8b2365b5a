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
from melinoe.experts.low_rank import projection_size
from melinoe.models.layers import MoeLayer, experts_per_token
from melinoe.models.undecorated import has_flat_experts
from melinoe.runtime import probe
from melinoe.runtime.speed import Machine, Rates, Shape, predict
from melinoe.store.layout import RecordLayout
from melinoe.store.packing import FORMATS, packing_of

POLICIES = ("decay", "lru", "lfu")
NO_CACHE = "no cache"
LITTLE = 1.1  # times faster than no cache, up to which a cache does not pay


@dataclass(frozen=True)
class Records:
    """The experts of a model, before they are taken out of it.

    layouts: of each layer, in its own dtype. module: of the first layer. hidden_size: of its inputs.
    """

    layouts: tuple[RecordLayout, ...]
    num_experts: tuple[int, ...]
    module: Any
    hidden_size: int

    @classmethod
    def of(cls, model: Any, layers: list[MoeLayer]) -> Records:
        first = layers[0].experts
        hidden_size = model.config.get_text_config().hidden_size
        if not has_flat_experts(model):
            hidden_size, _ = projection_size(first, "up")
        return cls(
            tuple(RecordLayout.of(layer.experts) for layer in layers),
            tuple(layer.num_experts for layer in layers),
            first,
            int(hidden_size),
        )

    def in_format(self, format: str) -> list[tuple[int, int]]:
        """(experts, bytes of a record) of each layer in a store format."""
        sizes = []
        for layout in self.layouts:
            packing = packing_of(format, layout, bool(self.module.is_transposed))
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

    Each has "shape" and "rates" too, what it was made of.

    Args:
        model: without its experts, on the meta device.
        files: of the model, to measure reading with; none: nothing can be said of this machine.
        slots_of: how many slots per layer a budget has for (experts, bytes of a record) of each layer.
        machine: instead of this one.
    """
    shape = Shape(
        len(records.layouts), max(records.num_experts), experts_per_token(model), dense_bytes(model)
    )
    rows, bookkeeping = [], None
    for format in FORMATS:
        sizes = records.in_format(format)
        try:
            slots = slots_of(sizes)
        except MelinoeError:  # not one slot in every layer
            slots = 0
        largest = max(size for _, size in sizes)
        if machine is not None:
            rates = machine.rates(largest, sum(count * size for count, size in sizes), shape.top_k)
        else:
            read = probe.group_seconds(files, largest, sorted({1, shape.top_k}))
            if read is None:
                return []
            bookkeeping = bookkeeping or probe.bookkeeping()
            rates = Rates(*bookkeeping, *_arithmetic(model, records, format, shape.top_k), read)
        policies = [(NO_CACHE, 0), *((policy, slots) for policy in POLICIES if slots)]
        for policy, held in policies:
            found = predict(shape, rates, "lru" if policy == NO_CACHE else policy, held)
            made_of = {"shape": vars(shape), "rates": vars(rates)}
            rows.append({"format": format, "policy": policy, "slots": held, **vars(found), **made_of})
    return sorted(rows, key=lambda row: -row["tokens_per_second"])


def _arithmetic(model: nn.Module, records: Records, format: str, top_k: int) -> tuple[float, float]:
    """(bytes a second of weights by one row, seconds of one expert) on this machine."""
    hidden = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]
    dense = probe.dense_bytes_per_second(hidden, hidden, next(model.parameters()).dtype)
    expert = probe.expert_seconds(records.module, records.layouts[0], records.hidden_size, top_k, format)
    return dense, expert


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
