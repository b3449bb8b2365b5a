"""One layer's call while it is served: when each read is started, and which expert is handed out next."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch

from melinoe.paging.reader import Reader
from melinoe.paging.slots import SlotBank, Staging
from melinoe.paging.statistics import Statistics
from melinoe.routing.policies import Decision, Load

Views = Mapping[str, torch.Tensor]


class ServedCall:
    """Carries out the policy's decision on one call.

    `start` asks for the reads, all that can be asked for at once, in this order: misses that get a slot,
    misses that pass through staging, as many as there are staging records, and preloads, which this call does
    not need. A load into the slot of a hit waits until that hit has been computed. `next` then hands out the
    hits, those that are still arriving last, and after them the misses as they land. What it handed out is in
    use until it is called again.

    Args:
        bank: the layer's slots.
        staging: free as a whole: calls are served one after the other.
    """

    def __init__(
        self,
        layer: int,
        decision: Decision,
        bank: SlotBank,
        staging: Staging,
        reader: Reader,
        statistics: Statistics,
    ) -> None:
        self._layer, self._decision, self._bank, self._staging = layer, decision, bank, staging
        self._reader, self._statistics = reader, statistics
        self._hits = deque(decision.hits)
        self._streamed = deque(load.expert for load in decision.loads if not load.admit)
        self._free_staging = list(range(staging.count))
        self._behind: dict[int, tuple[Load, bool]] = {}  # loads into the slot of a hit, by that hit
        # misses on their way: the expert, and its staging record or None (a slot of its own)
        self._in_flight: dict[Future[Any], tuple[int, int | None]] = {}
        self._landed: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._in_use: tuple[int, int | None] | None = None

    def start(self) -> None:
        """Asks for everything; to be called once, before `next`."""
        hits = set(self._hits)
        for load in self._decision.loads:
            if load.admit:
                self._load_or_wait(load, hits, preload=False)
        self._stream()
        for load in self._decision.preloads:
            self._load_or_wait(load, hits, preload=True)
        self._hits = deque(sorted(hits, key=lambda expert: (expert in self._bank.pending, expert)))

    def next(self) -> tuple[int, Views] | None:
        """The next expert and its tensors, or None when all have been handed out.

        Raises:
            MelinoeError: its record could not be read.
        """
        self._release()
        if self._hits:
            expert = self._hits.popleft()
            arriving = self._bank.pending.pop(expert, None)
            if arriving is not None:
                began = time.perf_counter()
                self._reader.arrived(arriving.result())
                waited = time.perf_counter() - began
                self._statistics.stalled_seconds += waited
                self._statistics.preload_stalled_seconds += waited
            self._in_use = expert, None
            return expert, self._bank.views(expert)
        if self._in_flight:
            began = time.perf_counter()
            future = self._landed.get()
            self._statistics.stalled_seconds += time.perf_counter() - began
            self._reader.arrived(future.result())
            expert, index = self._in_use = self._in_flight.pop(future)
            views = self._bank.views(expert) if index is None else self._staging.views(self._layer, index)
            return expert, views
        return None

    def next_hits(self) -> list[tuple[int, Views]]:
        """All hits that are at hand and whose slot no load waits for; in use until `next`."""
        self._release()
        here = [
            expert for expert in self._hits if not (expert in self._bank.pending or expert in self._behind)
        ]
        self._hits = deque(expert for expert in self._hits if expert not in here)
        return [(expert, self._bank.views(expert)) for expert in here]

    def _release(self) -> None:
        """What was handed out last is computed: its staging record, or the slot it loses, can be filled."""
        if self._in_use is None:
            return
        expert, index = self._in_use
        self._in_use = None
        if index is not None:
            self._free_staging.append(index)
            self._stream()
        elif expert in self._behind:
            self._load(*self._behind.pop(expert))

    def _load_or_wait(self, load: Load, hits: set[int], preload: bool) -> None:
        if load.victim in hits:
            self._behind[load.victim] = (load, preload)
        else:
            self._load(load, preload)

    def _load(self, load: Load, preload: bool) -> None:
        """Starts reading an expert into a slot. A preload is left to whoever asks for that expert."""
        slot = self._bank.place(load.expert, load.victim)
        future = self._reader.read(self._layer, load.expert, self._bank.record(slot))
        if preload:
            self._bank.pending[load.expert] = future
        else:
            self._follow(future, load.expert, None)

    def _stream(self) -> None:
        while self._streamed and self._free_staging:
            expert, index = self._streamed.popleft(), self._free_staging.pop()
            future = self._reader.read(self._layer, expert, self._staging.record(self._layer, index))
            self._follow(future, expert, index)

    def _follow(self, future: Future[Any], expert: int, index: int | None) -> None:
        self._in_flight[future] = (expert, index)
        future.add_done_callback(self._landed.put)
