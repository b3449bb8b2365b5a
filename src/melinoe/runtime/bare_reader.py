"""How fast records can be read, by a reader that does nothing else."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

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
