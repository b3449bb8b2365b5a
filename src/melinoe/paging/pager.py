"""Serves the experts of one call: policy decides, reader moves bytes, the caller computes.

One pager belongs to one model. Its `serve` yields every expert that a call asks for, as soon as the
expert's record is in memory: first those that are there, while the others are being read.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from melinoe.errors import MelinoeError
from melinoe.paging.device_reader import DeviceReader
from melinoe.paging.expansion import ExpandingReader, Scratch, slot_layout
from melinoe.paging.slots import STAGING_RECORDS, Reader, RecordBuffer, SlotBank
from melinoe.paging.statistics import Statistics
from melinoe.routing.policies import Call, Load, Policy, Strength
from melinoe.store.manifest import Store

Views = dict[str, torch.Tensor]


class ExpertPager:
    """Slots, staging, policy and reader of one offloaded model.

    Args:
        store: where the records are.
        slots: per layer, 0 or more.
        policy: decides what stays; made for the same number of layers, experts and slots.
        staging: records that stream what is not kept, shared by all layers.
        reader: what moves records; None: from disk into host memory. A DeviceReader puts the slots on its
            device.
        packed: slots hold packed records, expanded at each use; for a store whose records are packed.
    """

    def __init__(
        self,
        store: Store,
        slots: int,
        policy: Policy,
        staging: int = STAGING_RECORDS,
        reader: DeviceReader | None = None,
        packed: bool = False,
    ) -> None:
        assert staging >= 2, staging
        self.store, self.policy, self.slots = store, policy, slots
        device = reader.device if reader is not None else None
        self._layouts = [slot_layout(layer, packed) for layer in store.layers]
        self.banks = [
            SlotBank(min(slots, layer.num_experts), layout, device)
            for layer, layout in zip(store.layers, self._layouts, strict=True)
        ]
        self.staging = RecordBuffer(staging, max(layout.record_bytes for layout in self._layouts), device)
        self._staging_views = [
            [layout.views(self.staging.tensor[i, : layout.record_bytes]) for i in range(staging)]
            for layout in self._layouts
        ]
        self.reader: Reader | DeviceReader | ExpandingReader = reader if reader is not None else Reader(store)
        self._scratch: Scratch | None = None
        if store.record_format != "auto" and packed:
            self._scratch = Scratch(store, device)
        elif store.record_format != "auto":
            self.reader = ExpandingReader(self.reader, store)
        self.statistics = Statistics()
        self._lock = threading.RLock()  # decisions follow program order; two threads take turns
        self._process = os.getpid()
        self._inside = False  # while a call is served
        self._unfinished = False  # behind a call that did not come to its end

    @property
    def slot_bytes(self) -> int:
        """Memory for experts: all slots, the staging records, and what packed records are expanded with."""
        buffers = [bank.buffer for bank in self.banks if bank.buffer.count] + [self.staging]
        if self._scratch is not None:
            buffers.append(self._scratch.buffer)
        if isinstance(self.reader, ExpandingReader):
            buffers.append(self.reader.buffers)
        return sum(buffer.tensor.nbytes for buffer in buffers)

    def reset(self) -> None:
        """Empties the slots and the policy's memory, after all reads have ended: a cold start."""
        with self._lock:
            self.reader.drain()
            for bank in self.banks:
                bank.clear()
            self.policy.reset()
            self._unfinished = False

    def begin(self, scores: np.ndarray | None = None, strength: Strength | None = None) -> None:
        """A new request starts; see `Policy.begin`."""
        with self._lock:
            self.policy.begin(scores, strength)

    def __reduce__(self) -> Any:
        raise MelinoeError(
            "an offloaded model cannot be copied or pickled: it has files and reading threads",
            next_step="load it once more with melinoe.load",
        )

    def weight_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that `serve` yields for an expert of this layer, by name."""
        return {field.name: field.shape for field in slot_layout(self.store.layers[layer], False).fields}

    def serve(self, layer: int, call: Call, training: bool = False) -> Iterator[tuple[int, Views]]:
        """Yields (expert, tensors) once for every expert of the call; the tensors hold until the next step.

        A call that does not come to its end (a read error, the caller stops, Ctrl-C) leaves a mark, and the
        next one begins with empty slots: no half-read record can be taken for an expert.

        Args:
            training: count the call as one of tuning, not as prefill or decoding.

        Raises:
            MelinoeError: a record could not be read, or this process is a fork of the one that loaded the
                model.
        """
        if os.getpid() != self._process:  # it shares the slots with its parent, and has none of the threads
            raise MelinoeError(
                "an offloaded model cannot be used in a fork of the process that loaded it",
                next_step="load it in every process (multiprocessing: start method spawn, or load after the"
                " fork)",
            )
        with self._lock:
            assert not self._inside, "a call inside a call would overwrite what the outer one uses"
            if self._unfinished:
                self.reset()
            self._inside = self._unfinished = True
            try:
                with contextlib.closing(self._serve(layer, call, training)) as served:
                    for expert, views in served:
                        yield expert, views if self._scratch is None else self._scratch.expand(layer, views)
                self._unfinished = False
            finally:
                self._inside = False

    def _serve(self, layer: int, call: Call, training: bool) -> Generator[tuple[int, Views]]:
        bank = self.banks[layer]
        in_flight: dict[
            Future[Any], tuple[int, int | None]
        ] = {}  # (expert, staging record or None: its slot)
        landed: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        decision = self.policy.request(layer, call)
        self.statistics.count(call, decision, self.store.layers[layer].layout.record_bytes, training)
        hits = set(decision.hits)
        streamed = deque(load.expert for load in decision.loads if not load.admit)
        free_staging = list(range(self.staging.count))
        behind: dict[int, tuple[Load, bool]] = {}  # loads into the slot of an expert that is served first

        def follow(future: Future[Any], expert: int, index: int | None) -> None:
            in_flight[future] = (expert, index)
            future.add_done_callback(landed.put)

        def start(load: Load, preload: bool) -> None:
            slot = bank.place(load.expert, load.victim)
            future = self.reader.read(layer, load.expert, bank.buffer.record(slot, bank.buffer.record_bytes))
            if preload:
                bank.pending[load.expert] = future
            else:
                follow(future, load.expert, None)

        def stream() -> None:
            while streamed and free_staging:
                expert, index = streamed.popleft(), free_staging.pop()
                length = self._layouts[layer].record_bytes
                follow(self.reader.read(layer, expert, self.staging.record(index, length)), expert, index)

        def start_or_wait(load: Load, preload: bool) -> None:
            if load.victim in hits:
                behind[load.victim] = (load, preload)
            else:
                start(load, preload)

        for load in decision.loads:
            if load.admit:
                start_or_wait(load, False)
        stream()
        for load in decision.preloads:  # last: this call does not need them
            start_or_wait(load, True)
        for expert in sorted(hits, key=lambda expert: (expert in bank.pending, expert)):
            arriving = bank.pending.pop(expert, None)
            if arriving is not None:
                self._wait(arriving)
            yield expert, bank.views(expert)
            if expert in behind:
                start(*behind.pop(expert))
        while in_flight:
            began = time.perf_counter()
            future = landed.get()
            self.statistics.stalled_seconds += time.perf_counter() - began
            self.reader.arrived(future.result())
            expert, index = in_flight.pop(future)
            yield expert, bank.views(expert) if index is None else self._staging_views[layer][index]
            if index is not None:
                free_staging.append(index)
                stream()

    def _wait(self, future: Future[Any]) -> None:
        began = time.perf_counter()
        self.reader.arrived(future.result())
        self.statistics.stalled_seconds += time.perf_counter() - began

    def close(self) -> None:
        self.reset()
        self.reader.close()
