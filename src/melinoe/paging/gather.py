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
from melinoe.paging.weights_file import WeightsFile
from melinoe.store.manifest import Store

BUFFER_BYTES = 4 * 2**20  # at most, of each reading thread
# one run of bytes of a shard: (shard, first byte, [(byte in the shard, place in the record, bytes)])
Run = tuple[int, int, list[tuple[int, int, int]]]


def buffer_bytes(store: Store) -> int:
    """Memory beside the slots that one reading thread needs for a store; 0 where records are aligned."""
    return min(BUFFER_BYTES, store.max_record_bytes + 2 * RECORD_ALIGNMENT) if store.shards else 0


class ShardFiles:
    """The open shards of an in-place store.

    Raises:
        MelinoeError: a shard is not the one that was indexed: exchanged between the check of the store and
            now.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.files: list[WeightsFile] = []
        self._buffers, self._buffer_bytes = threading.local(), buffer_bytes(store)
        for stamp in store.shards:
            file = WeightsFile(store.folder / stamp.file)
            self.files.append(file)
            if (file.size, file.mtime_ns) != (stamp.size, stamp.mtime_ns):
                raise MelinoeError(
                    f"the shard {file.path.resolve()} has changed since it was indexed",
                    got=f"{file.size} bytes, written at {file.mtime_ns} ns",
                    allowed=f"{stamp.size} bytes, written at {stamp.mtime_ns} ns",
                    next_step="load the checkpoint again",
                )

    def read(self, layer: int, expert: int, record: np.ndarray) -> int:
        """Fills `record` ([record_bytes] uint8) with one expert; its padding is left as it was.

        Returns:
            The bytes of the expert.

        Raises:
            OSError: it cannot be read, or a shard has changed; what was read is not to be used.
        """
        stored = self.store.layers[layer]
        used = set()
        for shard, start, pieces in _runs(stored.pieces, stored.sources[expert]):
            file = self.files[shard]
            used.add(file)
            if file.direct:
                self._read_aligned(file, start, pieces, record)
            else:
                for first, place, length in pieces:
                    file.read(record.data[place : place + length], first)
        for file in used:
            file.check()
        return sum(length for _, length in stored.pieces)

    def _read_aligned(
        self, file: WeightsFile, start: int, pieces: list[tuple[int, int, int]], record: np.ndarray
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
            got = os.preadv(file.descriptor, [view[:wanted]], position)
            for first, place, length in pieces:
                low, high = max(first, position), min(first + length, position + got)
                if low < high:
                    into = place + low - first
                    np.copyto(record[into : into + high - low], values[low - position : high - position])
            if position + got >= end:
                return
            position += got - got % RECORD_ALIGNMENT
            if got < RECORD_ALIGNMENT:
                raise OSError(f"{file.path} ended early")

    def close(self) -> None:
        for file in self.files:
            file.close()
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
