"""Reads records from the store's files into host memory.

Reads bypass the page cache (O_DIRECT) where the file system allows it, and otherwise drop what they
leave there; else the kernel would keep the whole store in memory and the budget would be a fiction.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from melinoe.errors import MelinoeError
from melinoe.paging.gather import ShardFiles
from melinoe.paging.reader import READER_THREADS
from melinoe.paging.weights_file import WeightsFile
from melinoe.store.manifest import Store


class DiskReader:
    """A `Reader` into page-aligned host memory; `bytes_read` / `busy_seconds` is the bandwidth it reached.

    Args:
        threads: reads at a time.
        arrived: done to each record once it is read and checked, by the thread that read it: (layer, record).
    """

    device = torch.device("cpu")

    def __init__(
        self,
        store: Store,
        threads: int = READER_THREADS,
        arrived: Callable[[int, torch.Tensor], None] | None = None,
    ) -> None:
        self.store = store
        self._threads, self._on_arrival = threads, arrived
        self._shards = ShardFiles(store) if store.shards else None
        self._files = [] if store.shards else [WeightsFile(store.path(i)) for i in range(len(store.layers))]
        self._pool = self._new_pool()
        self._lock = threading.Lock()
        self._checked: set[tuple[int, int]] = set()  # (layer, expert) of records that matched their checksum
        self._outstanding, self._since = 0, 0.0
        self.bytes_read, self.busy_seconds = 0, 0.0

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, thread_name_prefix="melinoe-read")

    def read(self, layer: int, expert: int, destination: torch.Tensor) -> Future[None]:
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
            self._check_first(layer, expert, destination)
            if self._on_arrival is not None:
                self._on_arrival(layer, torch.frombuffer(destination, dtype=torch.uint8))
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

    def _check_first(self, layer: int, expert: int, record: memoryview) -> None:
        """Compares a record with its checksum the first time it is read, where the store is opened so."""
        if not self.store.check_reads or (layer, expert) in self._checked:
            return
        stored, checksum = self.store.layers[layer], 0
        for place, length in stored.pieces or ((0, len(record)),):
            checksum = zlib.crc32(record[place : place + length], checksum)
        if checksum != stored.checksums[expert]:
            raise OSError("its bytes do not match their checksum")
        self._checked.add((layer, expert))

    def drain(self) -> None:
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
