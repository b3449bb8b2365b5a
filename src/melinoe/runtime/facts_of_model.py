"""Counts and measures what a plan is made of: on a model without weights, and in a second on this machine."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from melinoe.conversion.checkpoint import Checkpoint
from melinoe.conversion.in_place import NotInPlaceError, index_in_place
from melinoe.conversion.upgrade import open_upgraded
from melinoe.experts.low_rank import projection_size
from melinoe.machine import usable_device
from melinoe.models.layers import MoeLayer, experts_per_token
from melinoe.models.undecorated import has_flat_experts
from melinoe.paging.expansion import expansion_bytes, slot_records, slots_packed
from melinoe.paging.gather import buffer_bytes
from melinoe.paging.reader import READER_THREADS
from melinoe.runtime import probe
from melinoe.runtime.attach import strip
from melinoe.runtime.bare_reader import record_bandwidth
from melinoe.runtime.budget import needs_of
from melinoe.runtime.facts import Facts
from melinoe.runtime.speed import Rates, Shape
from melinoe.store.layout import RecordLayout
from melinoe.store.manifest import Store, is_store
from melinoe.store.packing import FORMATS, packing_of


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


def facts_of(
    source: str | Path,
    *,
    context: int | None,
    batch: int,
    device: str,
    slots_format: str | None,
    measure_seconds: float,
    formats: bool,
    rates: bool,
) -> Facts:
    """The facts of a model; arguments and errors as of `plan`.

    Args:
        formats: sizes in every store format. rates: what computing and reading take, of each.
    """
    place = usable_device(device)
    checkpoint = Checkpoint.open(source, weights=False)
    model, experts = checkpoint.model, Records.of(checkpoint.model, checkpoint.layers)
    with tempfile.TemporaryDirectory(prefix="melinoe-plan-") as scratch:
        store, not_measured = _store_of(checkpoint, Path(scratch) / "index")
        bandwidth = None
        if store is not None and measure_seconds > 0:
            bandwidth = record_bandwidth(store, measure_seconds)
    beside = 0
    if store is not None:
        packed = slots_packed(store, slots_format, place)
        records, beside = slot_records(store, packed), expansion_bytes(store, packed)
        read_bytes = [layer.layout.record_bytes for layer in store.layers]
    else:
        records = [
            (layer.num_experts, RecordLayout.of(layer.experts).record_bytes) for layer in checkpoint.layers
        ]
        read_bytes = [size for _, size in records]
    strip(model)
    extra = READER_THREADS * buffer_bytes(store) if store is not None else 0
    files = sorted(checkpoint.folder.rglob("*.safetensors"))
    return Facts(
        needs_of(model, context=context, batch=batch, extra_bytes=extra, device=place),
        records,
        read_bytes,
        beside,
        bandwidth,
        not_measured,
        Shape(len(experts.layouts), max(experts.num_experts), experts_per_token(model), dense_bytes(model)),
        {format: experts.in_format(format) for format in FORMATS} if formats else {},
        _measured(model, experts, files) if rates else {},
        time.time(),
    )


def _measured(model: nn.Module, records: Records, files: list[Path]) -> dict[str, Rates]:
    """{format: rates} of this machine; empty where nothing can be read.

    Args:
        model: without its experts, on the meta device.
        files: of the model, to measure reading with.
    """
    found: dict[str, Rates] = {}
    bookkeeping, top_k = None, experts_per_token(model)
    for format in FORMATS:
        largest = max(size for _, size in records.in_format(format))
        read = probe.group_seconds(files, largest, sorted({1, top_k}))
        if read is None:
            return {}
        bookkeeping = bookkeeping or probe.bookkeeping()
        found[format] = Rates(*bookkeeping, *_arithmetic(model, records, format, top_k), read)
    return found


def _arithmetic(model: nn.Module, records: Records, format: str, top_k: int) -> tuple[float, float]:
    """(bytes a second of weights by one row, seconds of one expert) on this machine."""
    hidden = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]
    dense = probe.dense_bytes_per_second(hidden, hidden, next(model.parameters()).dtype)
    expert = probe.expert_seconds(records.module, records.layouts[0], records.hidden_size, top_k, format)
    return dense, expert


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
