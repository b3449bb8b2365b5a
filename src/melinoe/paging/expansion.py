"""Where packed records become weights: when they arrive in a slot, or each time a packed slot is used.

`expanded` slots hold weights of full size; `ExpandingReader` stands before another reader, has the packed
record read into a buffer of its own and expands it into the slot, on threads of its own. `packed` slots hold
the record as it is on disk, so that the same memory holds two to four times the experts; `Scratch` expands
one when it is used. Both give the same bits (melinoe.store.packing says why).
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from melinoe.errors import MelinoeError
from melinoe.paging.reader import READER_THREADS, Reader
from melinoe.paging.slots import RecordBuffer
from melinoe.store.layout import RecordLayout
from melinoe.store.manifest import Store
from melinoe.store.packing import Tensors
from melinoe.store.record_file import StoredLayer

SLOTS_FORMATS = ("packed", "expanded")
DEFAULT_SLOTS_FORMAT = "expanded"  # measured faster on a CPU with a disk of 1 GB/s (docs/results.md)


def slots_packed(store: Store, slots_format: str | None) -> bool:
    """Whether slots hold packed records; None chooses the default. Without packed records: False.

    Raises:
        MelinoeError: no such choice, or packed slots for a store whose records are not packed.
    """
    if slots_format is not None and slots_format not in SLOTS_FORMATS:
        raise MelinoeError("unknown format of slots", got=slots_format, allowed=", ".join(SLOTS_FORMATS))
    if store.record_format == "auto":
        if slots_format == "packed":
            raise MelinoeError(
                f"the records of {store.folder} are not packed",
                got="slots format packed",
                allowed="expanded",
                next_step="pack them with: melinoe convert --format int8",
            )
        return False
    return (slots_format or DEFAULT_SLOTS_FORMAT) == "packed"


def slot_layout(layer: StoredLayer, packed: bool) -> RecordLayout:
    """What a slot of a layer holds."""
    return layer.layout if packed or layer.packing is None else layer.packing.expanded


def slot_records(store: Store, packed: bool) -> list[tuple[int, int]]:
    """(number of experts, bytes of a slot) of each layer, as the budget asks for them."""
    return [(layer.num_experts, slot_layout(layer, packed).record_bytes) for layer in store.layers]


def expansion_bytes(store: Store, packed: bool) -> int:
    """Memory beside slots and staging: the scratch record, or the buffers of the expanding reader."""
    if store.record_format == "auto":
        return 0
    if packed:
        return max(slot_layout(layer, False).record_bytes for layer in store.layers)
    return READER_THREADS * store.max_record_bytes


class Scratch:
    """One record of full size that packed ones are expanded into, one after the other."""

    def __init__(self, store: Store, device: torch.device) -> None:
        layouts = [slot_layout(layer, False) for layer in store.layers]
        self.buffer = RecordBuffer(1, max(layout.record_bytes for layout in layouts), device)
        self._views = [layout.views(self.buffer.tensor[0, : layout.record_bytes]) for layout in layouts]
        self._packings = [layer.packing for layer in store.layers]

    def expand(self, layer: int, packed: Tensors) -> Tensors:
        """The weights of a packed record; they hold until the next call."""
        packing = self._packings[layer]
        assert packing is not None
        packing.expand(packed, self._views[layer])
        return self._views[layer]


class ExpandingReader:
    """A `Reader` that has packed records read and expands them to full size; counts packed bytes.

    Each of a few threads has a buffer for one packed record. On an accelerator the buffers are device memory
    and the expansion runs on a stream of its own: behind the slot's last use, and ahead of the next copy into
    the same buffer, by events alone.
    """

    def __init__(self, reader: Reader, store: Store, threads: int = READER_THREADS) -> None:
        self.reader, self.store = reader, store
        self.device = reader.device
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.buffers = RecordBuffer(threads, store.max_record_bytes, self.device)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(threads):
            self._free.put(index)
        self._pool = self._new_pool()
        self._lock = threading.Lock()  # one expansion is launched at a time on a stream

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.buffers.count, thread_name_prefix="melinoe-expand")

    @property
    def bytes_read(self) -> int:
        return self.reader.bytes_read

    @property
    def busy_seconds(self) -> float:
        return self.reader.busy_seconds

    def read(self, layer: int, expert: int, destination: torch.Tensor) -> Future[Any]:
        """Starts moving one record; `destination` is a full-size record (uint8)."""
        after = None
        if self._stream is not None:
            after = torch.cuda.current_stream(self.device).record_event()
        return self._pool.submit(self._read, layer, expert, destination, after)

    def _read(self, layer: int, expert: int, destination: torch.Tensor, after: Any) -> Any:
        stored = self.store.layers[layer]
        assert stored.packing is not None
        index = self._free.get()
        try:
            packed = self.buffers.record(index, stored.layout.record_bytes)
            views = stored.layout.views(packed), stored.packing.expanded.views(destination)
            if self._stream is None:
                self.reader.arrived(self.reader.read(layer, expert, packed).result())
                stored.packing.expand(*views)
                return None
            with torch.cuda.stream(self._stream):
                moved = self.reader.read(layer, expert, packed).result()
                with self._lock:
                    self._stream.wait_event(after)
                    self.reader.arrived(moved)
                    stored.packing.expand(*views)
                    return self._stream.record_event()
        finally:
            self._free.put(index)

    def drain(self) -> None:
        self._pool.shutdown(wait=True)
        self._pool = self._new_pool()
        self.reader.drain()

    def arrived(self, event: Any) -> None:
        """Makes the caller's stream wait for an expanded record; the host goes on."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self.reader.close()
