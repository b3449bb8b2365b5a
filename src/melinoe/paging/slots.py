"""Memory that records are read into: each layer's slots, and staging records. Knows no policy."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from melinoe.config import format_bytes
from melinoe.errors import MelinoeError
from melinoe.store.layout import RecordLayout

STAGING_RECORDS = 4  # records beside the slots; at least 2, so that one is read while another is used


class RecordBuffer:
    """`count` records of memory, page-aligned on the host (O_DIRECT asks for it), or of device memory."""

    def __init__(self, count: int, record_bytes: int, device: torch.device | None = None) -> None:
        self.count, self.record_bytes = count, record_bytes
        if device is None or device.type == "cpu":
            # shared with forked children, who must not use it (ExpertPager refuses): private pages that are
            # copied on a fork while the disk writes to them can be lost (man 2 open, O_DIRECT)
            memory = mmap.mmap(-1, max(1, count) * record_bytes)
            self.tensor = torch.frombuffer(memory, dtype=torch.uint8).view(-1, record_bytes)
        else:
            self.tensor = torch.empty(max(1, count), record_bytes, dtype=torch.uint8, device=device)

    def record(self, index: int, length: int) -> torch.Tensor:
        """The first `length` bytes of one record, to be read into."""
        return self.tensor[index, :length]


class HostRecords:
    """`count` records of host memory that a GPU reads by itself, filled first and pinned then.

    Huge pages that are pinned when they are filled take 0.22 s a GB on a machine where torch's pinned memory
    takes 0.55, and are read as fast (docs/log.md). Never written after `pin`, so that a fork's children, who
    share them from then on, do no harm.

    Args:
        device: of the GPU; the CPU pins nothing.
    """

    def __init__(self, count: int, record_bytes: int, device: torch.device) -> None:
        self._bytes = max(1, count) * record_bytes
        self._memory = mmap.mmap(-1, self._bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        # while they are filled a fork's children must not have them: a private page that is copied on a fork
        # while the disk writes to it can be lost (man 2 open, O_DIRECT)
        self._memory.madvise(mmap.MADV_DONTFORK)
        self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8).view(-1, record_bytes)
        self._device = device
        self.free: Callable[[], None] = lambda: None  # nobody reads them any more

    def pin(self) -> None:
        """Makes them, filled by now, such as a GPU may read.

        Raises:
            MelinoeError: the driver refuses.
        """
        self._memory.madvise(mmap.MADV_DOFORK)
        if self._device.type != "cuda":
            return
        with torch.cuda.device(self._device):
            error = int(torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), self._bytes, 0))
        if error:
            raise MelinoeError(
                "host memory could not be pinned for the device",
                got=f"CUDA error {error} for {format_bytes(self._bytes)}",
                next_step="raise the limit of locked memory (ulimit -l), or use a smaller store",
            )
        # memory that goes while it is pinned could not be pinned again at its address
        unpin = weakref.finalize(self, _unpin, self.tensor.data_ptr(), self._device)
        unpin.atexit = False
        self.free = unpin


def _unpin(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(address)


class SlotBank:
    """The slots of one layer: which expert's record stands where.

    `slot_of` names an expert from the moment its load is started; `pending` holds the loads that
    nobody has waited for yet. `changes` grows whenever an expert takes a slot, or all lose theirs.
    """

    def __init__(self, slots: int, layout: RecordLayout, device: torch.device | None = None) -> None:
        self.buffer = RecordBuffer(slots, layout.record_bytes, device)
        self._views = [layout.views(self.buffer.tensor[slot]) for slot in range(slots)]
        self._slots = slots
        self.changes = 0
        self.clear()

    def clear(self) -> None:
        self.changes += 1
        self.slot_of: dict[int, int] = {}
        self.pending: dict[int, Future[Any]] = {}
        self._free = list(range(self._slots - 1, -1, -1))

    def place(self, expert: int, victim: int | None) -> int:
        """Gives `expert` the slot of `victim`, or a free one, and returns the slot's number.

        A load into the victim's slot that is still under way is waited for: two reads must never
        write the same bytes.
        """
        if victim is None:
            slot = self._free.pop()
        else:
            pending = self.pending.pop(victim, None)
            if pending is not None:
                pending.result()
            slot = self.slot_of.pop(victim)
        assert expert not in self.slot_of, expert
        self.changes += 1
        self.slot_of[expert] = slot
        return slot

    def record(self, slot: int) -> torch.Tensor:
        """A slot, to be read into."""
        return self.buffer.record(slot, self.buffer.record_bytes)

    def views(self, expert: int) -> dict[str, torch.Tensor]:
        """The tensors of an expert that stands in a slot."""
        return self.slot_views(self.slot_of[expert])

    def slot_views(self, slot: int) -> dict[str, torch.Tensor]:
        """The tensors of the expert that stands in this slot."""
        return self._views[slot]

    def addresses(self, names: tuple[str, ...]) -> list[tuple[int, ...]]:
        """Where the tensors of these names lie, slot by slot."""
        return [tuple(views[name].data_ptr() for name in names) for views in self._views]


class Staging:
    """A few records beside the slots, shared by all layers: what is not kept passes through them.

    Args:
        layouts: of each layer's records.
    """

    def __init__(self, count: int, layouts: list[RecordLayout], device: torch.device | None = None) -> None:
        assert count >= 2, count
        self.count = count
        self.buffer = RecordBuffer(count, max(layout.record_bytes for layout in layouts), device)
        self._layouts = layouts
        self._views = [
            [layout.views(self.record(layer, index)) for index in range(count)]
            for layer, layout in enumerate(layouts)
        ]

    def record(self, layer: int, index: int) -> torch.Tensor:
        """A staging record as one of this layer's, to be read into."""
        return self.buffer.record(index, self._layouts[layer].record_bytes)

    def views(self, layer: int, index: int) -> dict[str, torch.Tensor]:
        """The tensors of the expert that a staging record holds."""
        return self._views[layer][index]
