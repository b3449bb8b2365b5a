"""How much memory a tuning run needs, and how many experts fit beside it.

`tune --dry-run` and `tune --memory` ask here. Everything is counted from shapes on the meta device; no weight
is read. As elsewhere (docs/decisions/0004), the interpreter and its libraries are not part of the number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from melinoe.config import RECORD_ALIGNMENT, format_bytes
from melinoe.data.encoding import Encoded
from melinoe.errors import MelinoeError
from melinoe.experts.low_rank import projection_size
from melinoe.machine import total_memory
from melinoe.models.folder import local_folder, resolve_model
from melinoe.models.layers import MoeLayer, experts_per_token, moe_layers
from melinoe.models.pretrained import skeleton
from melinoe.models.undecorated import has_flat_experts
from melinoe.paging.expansion import expansion_bytes, slot_records
from melinoe.paging.gather import BUFFER_BYTES, buffer_bytes
from melinoe.paging.reader import READER_THREADS
from melinoe.paging.slots import STAGING_RECORDS
from melinoe.runtime.division import given_bytes
from melinoe.store.layout import RecordLayout
from melinoe.store.manifest import Store, is_store, open_store
from melinoe.tuning.memory.activations import BatchShape, count
from melinoe.tuning.settings import TuneSettings
from melinoe.tuning.step.batches import part_of


@dataclass(frozen=True)
class RunMemory:
    """Bytes of one run by purpose; the paged one without slots.

    resident: weights that are not experts'. experts: their weights, in the dtype of the computation; paged:
    what streams them. trained: routers in float32 and their frozen copies, low-rank factors. gradients,
    optimizer: of what is trained. activations: what is kept for the backward pass of the largest batch, and
    what computing it takes besides. loading: what reading the weights takes beyond all that for a while.
    """

    resident: int
    experts: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    loading: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class TuningMemory:
    """What a run needs with its experts in memory and with its experts paged, without and with checkpointing.

    slot: bytes of one slot in every layer; packed_slot: the same for packed records, None where there are
    none. checkpointed: what the run was set to; a budget is divided for that. parts: batches of a step that
    one process computes one after the other; batch is the largest of them.
    """

    resident: RunMemory
    resident_checkpointed: RunMemory
    paged: RunMemory
    paged_checkpointed: RunMemory
    num_experts: int
    slot: int
    packed_slot: int | None
    batch: BatchShape
    device: str
    checkpointed: bool
    parts: int

    def paged_run(self, checkpointed: bool) -> RunMemory:
        return self.paged_checkpointed if checkpointed else self.paged

    def fits(self, memory: int | str) -> bool:
        """Whether a budget is enough to stream every expert."""
        given = given_bytes(memory, torch.device(self.device))
        return given >= self.paged_run(self.checkpointed).total

    def slots(self, memory: int | str) -> tuple[int, str | None]:
        """(slots per layer, slots format) for a budget; all experts at most, and 0 is enough.

        Packed records stay packed in the slots unless all experts fit as they are computed with: a step asks
        for nearly all of them, so what counts is how many are there.

        Raises:
            MelinoeError: not even streaming every expert fits.
        """
        given = given_bytes(memory, torch.device(self.device))
        least = self.paged_run(self.checkpointed).total
        if given < least:
            raise MelinoeError(
                "the memory budget is too small to tune this model",
                got=format_bytes(given),
                allowed=f"{-(-least // 2**20)}MiB or more",
                next_step=("" if self.checkpointed else "--gradient-checkpointing, or ")
                + "a smaller --batch-tokens or --rank needs less; --dry-run shows what takes how much",
            )
        left = given - least
        if self.packed_slot is not None and left < self.num_experts * self.slot:
            return min(self.num_experts, left // self.packed_slot), "packed"
        return min(self.num_experts, left // self.slot), None

    def refuse_more_than_there_is(self, all_slots: bool) -> None:
        """For a run without a budget. all_slots: its experts are paged, each with a slot.

        Raises:
            MelinoeError: it needs more memory than the device has, used or free.
        """
        there_is = total_memory(torch.device(self.device))
        paged, resident = self.paged_run(self.checkpointed), self.resident
        if self.checkpointed:
            resident = self.resident_checkpointed
        needed = paged.total + self.num_experts * self.slot if all_slots else resident.total
        if needed > there_is:
            raise MelinoeError(
                "this run needs more memory than there is",
                got=format_bytes(needed),
                allowed=f"up to {format_bytes(there_is)}",
                next_step="a smaller --rank or --batch-tokens, --gradient-checkpointing or --memory needs"
                " less; --dry-run shows what takes how much",
            )

    def budget_line(self, memory: int | str) -> str:
        """What a budget buys. Raises MelinoeError where it is too small."""
        slots, kind = self.slots(memory)
        return (
            f"--memory {memory}: {slots} of {self.num_experts} experts of each layer in slots"
            f"{f', {kind}' if kind else ''}, the others are read for every pass"
            f"{f' of each of the {self.parts} parts of a step' if self.parts > 1 else ''}"
        )

    def to_json(self, memory: int | str | None = None) -> dict[str, Any]:
        """`slots` is None where no budget was given."""
        slots, kind = self.slots(memory) if memory is not None else (None, None)
        totals = {name: run.total for name, run in self._runs().items()}
        return {**asdict(self), "totals": totals, "memory": memory, "slots": slots, "slots_format": kind}

    def _runs(self) -> dict[str, RunMemory]:
        names = ("resident", "resident_checkpointed", "paged", "paged_checkpointed")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        """The table that people read."""
        titles = {
            "resident": "weights that are not experts",
            "experts": "experts, or what streams them",
            "trained": "routers and low-rank factors",
            "gradients": "gradients",
            "optimizer": "AdamW's moments",
            "activations": "activations and work space",
            "loading": "more, while weights are read",
            "total": "in all",
        }
        runs = self._runs()
        lines = [" " * 30 + "".join(f"{name.replace('_', ', '):>24}" for name in runs)]
        lines += [
            f"{title:<30}" + "".join(f"{format_bytes(getattr(run, field)):>24}" for run in runs.values())
            for field, title in titles.items()
        ]
        packed = f", packed {format_bytes(self.packed_slot)}" if self.packed_slot is not None else ""
        lines.append(
            f"largest batch {self.batch.rows} rows of {self.batch.length} tokens; one slot in every layer"
            f" {format_bytes(self.slot)}{packed}; {self.num_experts} experts per layer"
        )
        return "\n".join(lines)


def check_family(model: nn.Module) -> None:
    """Raises MelinoeError for a family whose experts no adapter can name."""
    if has_flat_experts(model):
        raise MelinoeError(
            "this family can be paged and traced, but not tuned: an adapter cannot name one of its experts",
            got=type(model).__name__,
            allowed="a model whose experts weights are [experts, in, out]",
        )


def device_of(settings: TuneSettings) -> str:
    return settings.device or ("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(settings: TuneSettings, device: str) -> torch.dtype | None:
    """What a run computes in, unless told otherwise.

    float32 on a CPU; elsewhere the checkpoint's own dtype (None).
    """
    dtype = settings.dtype or ("float32" if device == "cpu" else "auto")
    return torch.float32 if dtype == "float32" else None


def batch_shape(
    encoded: list[Encoded], plan: Sequence[list[int]], settings: TuneSettings, parts: int = 1
) -> BatchShape:
    """The largest of each over the parts into which a plan's steps are divided."""
    batches = [part_of(rows, part, parts) for rows in plan for part in range(parts)]
    sizes = [(len(rows), max(len(encoded[row].ids) for row in rows)) for rows in batches]
    rows, length = max(sizes, key=lambda size: size[0] * size[1])
    predicted = max(
        sum(
            len(encoded[row].ids) - 1 if settings.distills_prompt else encoded[row].num_answer_tokens
            for row in rows
        )
        for rows in batches
    )
    return BatchShape(rows, length, predicted)


def memory_needed(source: str | Path, settings: TuneSettings, batch: BatchShape, device: str) -> TuningMemory:
    """Counts a run from the config of a checkpoint or store.

    Raises:
        MelinoeError: no such model, or a dense one.
    """
    folder = local_folder(resolve_model(source))
    store = open_store(folder) if is_store(folder) else None
    model = skeleton(folder)
    layers = moe_layers(model)
    check_family(model)
    for layer in layers:
        settings.capacity(layer.num_experts, experts_per_token(model))  # what `tune` would refuse
    slots, packed, streaming = _slot_bytes(store, layers)
    own = model.dtype  # of the records, which are read and kept as they are
    dtype = compute_dtype(settings, device) or own
    file = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    model.to(dtype)
    # transformers has the file mapped while it makes parameters of it, and of the largest the parts as well
    loading = 2 * max(tensor.nbytes for tensor in model.parameters()) + file
    loading += sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    experts = sum(p.nbytes for layer in layers for p in layer.experts.parameters(recurse=False))
    rest = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - experts
    routers = sum(p.numel() * 4 for layer in layers for p in layer.router.parameters())
    factors = sum(_factor_bytes(layer, settings.rank) for layer in layers)
    moving = routers + (factors if settings.form.experts else 0)
    converted = {projection_size(layer.experts, side) for layer in layers for side in ("up", "down")}
    record = sum(size_in * size_out * dtype.itemsize for size_in, size_out in converted)
    kinds = {}
    found = count(model, layers, batch, settings)
    for paged in (False, True):
        besides = found.transient + (record if paged and own != dtype else 0)
        # AdamW's own temporaries: of one tensor on a CPU, of all on an accelerator; by then the activations
        # are gone
        step = moving if device != "cpu" else 2 * factors // max(1, 4 * len(layers))
        for checkpointed in (False, True):
            kept = found.checkpointed if checkpointed else found.kept
            kinds[paged, checkpointed] = RunMemory(
                resident=rest,
                experts=streaming if paged else experts,
                trained=2 * routers + factors,
                gradients=moving,
                optimizer=2 * moving,
                activations=max(kept + besides, step),
            )
            if not paged and device == "cpu":
                run = kinds[paged, checkpointed]
                kinds[paged, checkpointed] = replace(run, loading=max(0, loading - run.total))
    return TuningMemory(
        kinds[False, False], kinds[False, True], kinds[True, False], kinds[True, True],
        max(layer.num_experts for layer in layers), slots, packed, batch, device,
        settings.gradient_checkpointing, settings.accumulate,
    )  # fmt: skip


def _factor_bytes(layer: MoeLayer, rank: int) -> int:
    sides = projection_size(layer.experts, "up"), projection_size(layer.experts, "down")
    return layer.num_experts * rank * sum(map(sum, sides)) * 4


def _slot_bytes(store: Store | None, layers: list[MoeLayer]) -> tuple[int, int | None, int]:
    """(one slot in every layer, the same packed, what streams records), in bytes.

    Of a checkpoint as an in-place store would have it.
    """
    if store is None:
        sizes = [RecordLayout.of(layer.experts).record_bytes for layer in layers]
        read = READER_THREADS * min(BUFFER_BYTES, max(sizes) + 2 * RECORD_ALIGNMENT)
        return sum(sizes), None, STAGING_RECORDS * max(sizes) + read
    full = [size for _, size in slot_records(store, False)]
    packed = [size for _, size in slot_records(store, True)]
    read = READER_THREADS * buffer_bytes(store)
    beside = max(expansion_bytes(store, kind) for kind in (False, True))
    streaming = STAGING_RECORDS * max(full) + read + beside
    return sum(full), sum(packed) if store.record_format != "auto" else None, streaming
