"""Reads the experts of an in-place store: pieces of a checkpoint's shards into one record.

Shards are not aligned, and O_DIRECT asks for it: the enclosing aligned range is read into a small aligned
buffer and copied from there, a few MiB at a time. Pieces that stand next to each other are read together.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator

import numpy as np

from melinoe.config import RECORD_ALIGNMENT
from melinoe.errors import MelinoeError
from melinoe.offload.store import Store

BUFFER_BYTES = 4 * 2**20  # at most, of each reading thread
# one run of bytes of a shard: (shard, first byte, [(byte in the shard, place in the record, bytes)])
Run = tuple[int, int, list[tuple[int, int, int]]]


def buffer_bytes(store: Store) -> int:
    """Memory beside the slots that one reading thread needs for a store; 0 where records are aligned."""
    return min(BUFFER_BYTES, store.max_record_bytes + 2 * RECORD_ALIGNMENT) if store.shards else 0


class ShardFiles:
    """The open shards of an in-place store. What is open stays readable when a file is deleted."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.files: list[tuple[int, bool]] = []
        self._buffers, self._buffer_bytes = threading.local(), buffer_bytes(store)
        for number, shard in enumerate(store.shards):
            path = store.folder / shard.file
            try:
                self.files.append((os.open(path, os.O_RDONLY | os.O_DIRECT), True))
            except OSError:  # tmpfs and others have no O_DIRECT
                self.files.append((os.open(path, os.O_RDONLY), False))
            self._check(number)

    def _check(self, number: int) -> None:
        """Refuses a shard that was written to, or exchanged between the check of the store and now."""
        stamp, status = self.store.shards[number], os.fstat(self.files[number][0])
        if (status.st_size, status.st_mtime_ns) != (stamp.size, stamp.mtime_ns):
            raise MelinoeError(
                f"the shard {(self.store.folder / stamp.file).resolve()} has changed while it was in use",
                got=f"{status.st_size} bytes, written at {status.st_mtime_ns} ns",
                allowed=f"{stamp.size} bytes, written at {stamp.mtime_ns} ns",
                next_step="load the checkpoint again",
            )

    def read(self, layer: int, expert: int, record: np.ndarray) -> int:
        """Fills `record` ([record_bytes] uint8) with one expert; its padding is left as it was.

        Returns:
            The bytes of the expert.

        Raises:
            OSError: it cannot be read.
            MelinoeError: a shard has changed; what was read is not to be used.
        """
        stored = self.store.layers[layer]
        shards = set()
        for shard, start, pieces in _runs(stored.pieces, stored.sources[expert]):
            descriptor, direct = self.files[shard]
            if direct:
                self._read_aligned(descriptor, start, pieces, record)
            else:
                _read_plain(descriptor, pieces, record)
            shards.add(shard)
        for shard in shards:
            self._check(shard)
        return sum(length for _, length in stored.pieces)

    def _read_aligned(
        self, descriptor: int, start: int, pieces: list[tuple[int, int, int]], record: np.ndarray
    ) -> None:
        buffer = getattr(self._buffers, "buffer", None)
        if buffer is None:
            memory = mmap.mmap(-1, self._buffer_bytes)
            buffer = self._buffers.buffer = (memoryview(memory), np.frombuffer(memory, dtype=np.uint8))
        view, values = buffer
        end = pieces[-1][0] + pieces[-1][2]
        position = start - start % RECORD_ALIGNMENT
        while position < end:
            wanted = min(self._buffer_bytes, -(-(end - position) // RECORD_ALIGNMENT) * RECORD_ALIGNMENT)
            got = os.preadv(descriptor, [view[:wanted]], position)
            for first, place, length in pieces:
                low, high = max(first, position), min(first + length, position + got)
                if low < high:
                    into = place + low - first
                    np.copyto(record[into : into + high - low], values[low - position : high - position])
            if position + got >= end:
                return
            position += got - got % RECORD_ALIGNMENT
            if got < RECORD_ALIGNMENT:
                raise OSError("the file ended early")

    def close(self) -> None:
        for descriptor, _ in self.files:
            os.close(descriptor)
        self.files = []


def _runs(pieces: tuple[tuple[int, int], ...], sources: tuple[tuple[int, int], ...]) -> Iterator[Run]:
    """Pieces by shard and place in it; a gap of less than a page ends no run."""
    found = sorted(
        (shard, first, place, length) for (place, length), (shard, first) in zip(pieces, sources, strict=True)
    )
    run: Run | None = None
    for shard, first, place, length in found:
        if run is not None:
            last, _, held = run
            if last == shard and 0 <= first - (held[-1][0] + held[-1][2]) < RECORD_ALIGNMENT:
                held.append((first, place, length))
                continue
            yield run
        run = (shard, first, [(first, place, length)])
    if run is not None:
        yield run


def _read_plain(descriptor: int, pieces: list[tuple[int, int, int]], record: np.ndarray) -> None:
    for first, place, length in pieces:
        done = 0
        while done < length:
            got = os.preadv(descriptor, [record.data[place + done : place + length]], first + done)
            if got == 0:
                raise OSError("the file ended early")
            done += got
        os.posix_fadvise(descriptor, first, length, os.POSIX_FADV_DONTNEED)
