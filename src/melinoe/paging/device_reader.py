"""The tier between disk and an accelerator: records in pinned host memory, copied on a stream of their own.

`DeviceReader` stands where `DiskReader` stands on a machine without an accelerator: it is asked for the same
records and returns the same futures; only the destination is device memory and the future's result is an
event. Ordering is by events alone, the host never waits for the device here:

- a copy into a slot starts after everything that was launched before it was asked for (the slot's last use);
- a computation that uses the slot waits for the copy's event on its own stream.

Where the whole store does not fit in host memory, records pass through a few pinned buffers from disk.
Without an accelerator (device "cpu") the same code runs with plain copies; the tests use that.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from melinoe.machine import free_memory
from melinoe.paging.disk_reader import DiskReader
from melinoe.paging.reader import READER_THREADS
from melinoe.paging.slots import HostRecords, RecordBuffer
from melinoe.store.manifest import Store

HOST_SHARE = 0.8  # of the free host memory that the pinned store may take
PINNED_BUFFERS = 8  # records on their way from disk to the device, where the store stays on disk


class _Stream:
    """A copy stream of a device; on the CPU copies are done when they return and nothing needs ordering."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> Any:
        """Everything launched on the caller's stream until now."""
        return torch.cuda.current_stream(self.device).record_event() if self.stream is not None else None

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: list[Any]) -> Any:
        """Copies behind all of `after`; returns the event of the copy's end (None on the CPU)."""
        if self.stream is None:
            destination.copy_(source)
            return None
        for event in after:
            if event is not None:
                self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):
            destination.copy_(source, non_blocking=True)
            return self.stream.record_event()


class DeviceReader:
    """A `Reader` into device memory; counts as `DiskReader` does, bytes over the bus.

    Args:
        store: where the records are.
        device: where the slots are.
        pinned: hold the whole store in host memory; None: when it fits.
    """

    def __init__(self, store: Store, device: torch.device, pinned: bool | None = None) -> None:
        self.store, self.device = store, device
        self._disk = DiskReader(store)
        self._stream = _Stream(device)
        self._lock = threading.Lock()
        self._reading: Any = None  # the end of the last pass that reads slots without asking for them
        self.bytes_read = 0
        sizes = [layer.num_experts * layer.layout.record_bytes for layer in store.layers]
        self.pinned = sum(sizes) < free_memory() * HOST_SHARE if pinned is None else pinned
        self.in_place = self.pinned  # a GPU may read records where they lie, until `close`
        if self.pinned:
            self._held = [self._load(layer) for layer in range(len(store.layers))]
            self._records = [held.tensor for held in self._held]
        else:
            self._pool = self._new_pool()
            self._buffers: queue.Queue[torch.Tensor] = queue.Queue()
            for _ in range(PINNED_BUFFERS):
                self._buffers.put(self._host(1, store.max_record_bytes)[0])

    @staticmethod
    def _new_pool() -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READER_THREADS, thread_name_prefix="melinoe-copy")

    def _host(self, count: int, record_bytes: int) -> torch.Tensor:
        """Host memory that both the disk and the device can reach directly: pinned, and aligned to pages."""
        if self._stream.stream is None:
            return RecordBuffer(count, record_bytes).tensor
        return torch.empty(count, record_bytes, dtype=torch.uint8, pin_memory=True)

    @property
    def busy_seconds(self) -> float:
        """Seconds in which the disk was read; the benchmarks time copies over the bus, with events."""
        return self._disk.busy_seconds

    def _load(self, layer: int) -> HostRecords:
        """All records of a layer, [E, record_bytes], read once."""
        stored = self.store.layers[layer]
        held = HostRecords(stored.num_experts, stored.layout.record_bytes, self.device)
        records = held.tensor
        futures = [self._disk.read(layer, expert, records[expert]) for expert in range(stored.num_experts)]
        wait(futures)
        for future in futures:
            future.result()
        held.pin()
        return held

    def addresses(self, layer: int) -> list[int]:
        """Where the records of a layer lie in host memory, which a GPU reads by these very addresses."""
        assert self.in_place
        return [record.data_ptr() for record in self._records[layer]]

    def arrival(self, event: Any) -> bool:
        """Whether a copy has ended by now."""
        return event is None or bool(event.query())

    def copies_after(self, event: Any) -> None:
        """Copies that are asked for from now on wait for this event too, whichever stream asks."""
        self._reading = event

    def wait_for_copies(self) -> None:
        """Orders what the caller computes from now on behind all copies so far; the host goes on."""
        if self._stream.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream.stream)

    def read(self, layer: int, expert: int, destination: torch.Tensor) -> Future[Any]:
        """Starts moving one record; the future's result is for `arrived`."""
        with self._lock:
            self.bytes_read += destination.nbytes
        after = [self._stream.mark(), self._reading]
        if self.pinned:
            done: Future[Any] = Future()
            done.set_result(self._stream.copy(destination, self._records[layer][expert], after))
            return done
        return self._pool.submit(self._through_buffer, layer, expert, destination, after)

    def _through_buffer(self, layer: int, expert: int, destination: torch.Tensor, after: list[Any]) -> Any:
        buffer = self._buffers.get()
        try:
            length = destination.nbytes
            self._disk.read(layer, expert, buffer[:length]).result()
            event = self._stream.copy(destination, buffer[:length], after)
            if event is not None:
                event.synchronize()  # in this thread only: the buffer is free again
            return event
        finally:
            self._buffers.put(buffer)

    def drain(self) -> None:
        """Ends the reads, as every `Reader` does; copies on the stream may go on, before later ones."""
        if not self.pinned:
            self._pool.shutdown(wait=True)
            self._pool = self._new_pool()
        self._disk.drain()

    def arrived(self, event: Any) -> None:
        """Makes the caller's stream wait for a record; the host goes on."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def close(self) -> None:
        self.in_place = False
        if self.pinned:
            for held in self._held:
                held.free()
        else:
            self._pool.shutdown(wait=True)
        self._disk.close()
