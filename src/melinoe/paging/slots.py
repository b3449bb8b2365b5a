"""Memory: slots that hold records, and the reader that fills them. Knows bytes, no policy.

Reads bypass the page cache (O_DIRECT) where the file system allows it, and otherwise drop what they
leave there; else the kernel would keep the whole store in memory and the budget would be a fiction.
"""

from __future__ import annotations

import mmap
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from melinoe.errors import MelinoeError
from melinoe.paging.gather import ShardFiles
from melinoe.paging.weights_file import WeightsFile
from melinoe.store.layout import RecordLayout
from melinoe.store.manifest import Store

STAGING_RECORDS = 4  # records beside the slots; at least 2, so that one is read while another is used
READER_THREADS = 4  # reads in flight; a disk needs several to reach its bandwidth


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


class SlotBank:
    """The slots of one layer: which expert's record stands where.

    `slot_of` names an expert from the moment its load is started; `pending` holds the loads that
    nobody has waited for yet.
    """

    def __init__(self, slots: int, layout: RecordLayout, device: torch.device | None = None) -> None:
        self.buffer = RecordBuffer(slots, layout.record_bytes, device)
        self._views = [layout.views(self.buffer.tensor[slot]) for slot in range(slots)]
        self._slots = slots
        self.clear()

    def clear(self) -> None:
        self.slot_of: dict[int, int] = {}
        self.pending: dict[int, Future[None]] = {}
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
        self.slot_of[expert] = slot
        return slot

    def views(self, expert: int) -> dict[str, torch.Tensor]:
        return self._views[self.slot_of[expert]]


class Reader:
    """Reads records of a store into memory, several at a time.

    `bytes_read` and `busy_seconds` (time in which at least one read was outstanding) give the bandwidth
    that was reached.
    """

    def __init__(self, store: Store, threads: int = READER_THREADS) -> None:
        self.store = store
        self._threads = threads
        self._shards = ShardFiles(store) if store.shards else None
        self._files = [] if store.shards else [WeightsFile(store.path(i)) for i in range(len(store.layers))]
        self._pool = self._new_pool()
        self._lock = threading.Lock()
        self._outstanding, self._since = 0, 0.0
        self.bytes_read, self.busy_seconds = 0, 0.0

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, thread_name_prefix="melinoe-read")

    def read(self, layer: int, expert: int, destination: torch.Tensor) -> Future[None]:
        """Starts reading one record into `destination` (page-aligned host memory, a record long, uint8)."""
        with self._lock:
            if self._outstanding == 0:
                self._since = time.perf_counter()
            self._outstanding += 1
        return self._pool.submit(self._read, layer, expert, memoryview(destination.numpy()))

    def _read(self, layer: int, expert: int, destination: memoryview) -> None:
        done = 0
        try:
            if self._shards is not None:
                done = self._shards.read(layer, expert, np.asarray(destination))
            else:
                file, stored = self._files[layer], self.store.layers[layer]
                file.read(destination, stored.offset(expert))
                file.check()
                done = len(destination)
        except OSError as error:
            raise MelinoeError(
                f"cannot read expert {expert} from {self.store.path(layer)}",
                got=error,
                next_step="check the disk, then: convert again",
            ) from error
        finally:
            with self._lock:
                self._outstanding -= 1
                self.bytes_read += done
                if self._outstanding == 0:
                    self.busy_seconds += time.perf_counter() - self._since

    def drain(self) -> None:
        """Returns when no read is under way any more, also one whose future was lost to an exception."""
        self._pool.shutdown(wait=True)
        self._pool = self._new_pool()

    def arrived(self, result: None) -> None:
        """A record whose future is done is in host memory: there is nothing left to wait for."""

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self.__del__()

    def __del__(self) -> None:
        for file in getattr(self, "_files", []):
            file.close()
        self._files = []
        shards = getattr(self, "_shards", None)
        if shards is not None:
            shards.close()
