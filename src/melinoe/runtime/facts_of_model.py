"""Counts and measures what a plan is made of: on a model without weights, and in a second on this machine."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from melinoe.conversion.checkpoint import Checkpoint
from melinoe.conversion.in_place import NotInPlaceError, index_in_place
from melinoe.conversion.upgrade import open_upgraded
from melinoe.machine import usable_device
from melinoe.models.layers import experts_per_token
from melinoe.paging.expansion import expansion_bytes, slot_records, slots_packed
from melinoe.paging.gather import buffer_bytes
from melinoe.paging.reader import READER_THREADS
from melinoe.runtime.attach import strip
from melinoe.runtime.bare_reader import bare_group, group_bytes
from melinoe.runtime.budget import needs_of
from melinoe.runtime.facts import Facts
from melinoe.runtime.measured_rates import measured_rates
from melinoe.runtime.probe import Work, measure
from melinoe.runtime.records import Records
from melinoe.runtime.speed import Rates, Shape
from melinoe.store.manifest import Store, is_store
from melinoe.store.packing import FORMATS

BANDWIDTH = "bandwidth"


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
    remembered: bool | None = None,
) -> Facts:
    """The facts of a model; arguments and errors as of `plan`.

    Args:
        formats: sizes in every store format. rates: what computing and reading take, of each. remembered:
            what is known of this machine, as for `KeptRates`.
    """
    place = usable_device(device)
    checkpoint = Checkpoint.open(source, weights=False)
    model, experts = checkpoint.model, Records.of(checkpoint.model, checkpoint.layers)
    measured: dict[str, Rates] = {}
    with tempfile.TemporaryDirectory(prefix="melinoe-plan-") as scratch, ExitStack() as opened:
        store, not_measured = _store_of(checkpoint, Path(scratch) / "index")
        beside = 0
        if store is not None:
            packed = slots_packed(store, slots_format, place)
            records, beside = slot_records(store, packed), expansion_bytes(store, packed)
            read_bytes = [layer.layout.record_bytes for layer in store.layers]
        else:
            records = experts.in_format("auto")
            read_bytes = [size for _, size in records]
        bare: dict[str, Work] = {}
        if store is not None and measure_seconds > 0:
            bare[BANDWIDTH] = opened.enter_context(bare_group(store))
        strip(model)
        if rates:
            files = sorted(checkpoint.folder.rglob("*.safetensors"))
            measured, found = measured_rates(model, experts, files, bare, remembered)
        else:
            found = measure(bare, measure_seconds)
    bandwidth = None
    if store is not None and BANDWIDTH in found:
        bandwidth = group_bytes(store) / found[BANDWIDTH].seconds
    extra = READER_THREADS * buffer_bytes(store) if store is not None else 0
    return Facts(
        needs_of(model, context=context, batch=batch, extra_bytes=extra, device=place),
        records,
        read_bytes,
        beside,
        bandwidth,
        not_measured,
        Shape(len(experts.layouts), max(experts.num_experts), experts_per_token(model), dense_bytes(model)),
        {format: experts.in_format(format) for format in FORMATS} if formats else {},
        measured,
        time.time(),
    )


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
