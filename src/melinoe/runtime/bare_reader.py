"""How fast records can be read, by a reader that does nothing else."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from melinoe.paging.disk_reader import DiskReader
from melinoe.paging.reader import READER_THREADS
from melinoe.paging.slots import RecordBuffer
from melinoe.store.manifest import Store


def record_bandwidth(
    store: Store, seconds: float = 2.0, seed: int = 0, group_sizes: Sequence[int] = (READER_THREADS,)
) -> float:
    """Bytes per second that a bare reader reaches with the pager's pattern: random records, same threads.

    Args:
        group_sizes: how many records are asked for together, in turn: the misses of a layer.
    """
    reader = DiskReader(store)
    buffer = RecordBuffer(max(group_sizes), store.max_record_bytes)
    generator, sizes = np.random.default_rng(seed), itertools.cycle(group_sizes)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        layer = int(generator.integers(len(store.layers)))
        length = store.layers[layer].layout.record_bytes
        experts = generator.integers(store.layers[layer].num_experts, size=next(sizes))
        futures = [reader.read(layer, int(e), buffer.record(i, length)) for i, e in enumerate(experts)]
        for future in futures:
            future.result()
    bandwidth = reader.bytes_read / reader.busy_seconds
    reader.close()
    return bandwidth


@contextmanager
def bare_group(store: Store) -> Iterator[Callable[[int], None]]:
    """What reads as many random records as there are reading threads, and waits for them."""
    reader = DiskReader(store)
    buffer, generator = RecordBuffer(READER_THREADS, store.max_record_bytes), np.random.default_rng(0)

    def read(_: int) -> None:
        futures = []
        for place in range(READER_THREADS):
            layer = int(generator.integers(len(store.layers)))
            stored = store.layers[layer]
            into = buffer.record(place, stored.layout.record_bytes)
            futures.append(reader.read(layer, int(generator.integers(stored.num_experts)), into))
        for future in futures:
            future.result()

    try:
        yield read
    finally:
        reader.close()


def group_bytes(store: Store) -> float:
    """The mean of what a `bare_group` reads."""
    sizes = [layer.layout.record_bytes for layer in store.layers]
    return READER_THREADS * sum(sizes) / len(sizes)
