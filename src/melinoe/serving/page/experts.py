"""What happens to experts, for those who look on: a map of layers by experts, ten times a second.

Bounded whatever the model does: a map has one character for each expert, and is sent only where something
has changed. While nobody looks, the pager is not listened to.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import numpy as np

from melinoe.paging.pager import ExpertPager
from melinoe.routing.policies import Decision

MOST_WATCHERS = 8
PERIOD_SECONDS = 0.1
SILENCE_SECONDS = 15.0  # behind which a comment says that the stream lives
OUT, RESIDENT, HIT, PRELOADED, MISSED = range(5)
LETTERS = np.frombuffer(b".ohpm", np.uint8)  # of these five


class _Watcher:
    """What one of them has not been told yet."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes, self._lock = sizes, threading.Lock()
        self._marks = self._none()

    def _none(self) -> list[np.ndarray]:
        return [np.zeros(size, np.uint8) for size in self._sizes]

    def note(self, layer: int, decision: Decision) -> None:
        with self._lock:
            marks = self._marks[layer]
            for kind, experts in (
                (HIT, decision.hits),
                (PRELOADED, [load.expert for load in decision.preloads]),
                (MISSED, [load.expert for load in decision.loads]),
            ):
                for expert in experts:
                    marks[expert] = max(marks[expert], kind)

    def take(self) -> list[np.ndarray]:
        """[layer][expert] the most that happened to it since the last call: a miss hides a hit."""
        with self._lock:
            marks, self._marks = self._marks, self._none()
        return marks


class ExpertEvents:
    """Server-sent events of one pager. Belongs to one event loop; the pager may be in another thread."""

    def __init__(self, pager: ExpertPager) -> None:
        self._pager = pager
        self._sizes = [layer.num_experts for layer in pager.store.layers]
        self._watchers: list[_Watcher] = []
        self._closed = asyncio.Event()

    def close(self) -> None:
        """Ends all streams: the server is about to leave."""
        self._closed.set()

    @property
    def full(self) -> bool:
        """Whether as many look on as may."""
        return len(self._watchers) >= MOST_WATCHERS

    def watch(self, left: Awaitable[Any]) -> AsyncIterator[str]:
        """Events until `left` returns or `close` is called.

        An event is {"layers": [...], "slots", "prefill", "decode", "preload"}: for each layer one character
        per expert (. not in memory, o in a slot, h asked for and there, m asked for and read, p preloaded,
        since the event before), slots of all layers, and the counters of `Statistics` since the server
        started.
        """
        watcher = _Watcher(self._sizes)
        self._watchers.append(watcher)
        self._pager.watcher = self._note
        return self._events(watcher, left)

    def _note(self, layer: int, decision: Decision) -> None:
        for watcher in tuple(self._watchers):
            watcher.note(layer, decision)

    async def _events(self, watcher: _Watcher, left: Awaitable[Any]) -> AsyncIterator[str]:
        over = [asyncio.ensure_future(left), asyncio.ensure_future(self._closed.wait())]
        said, silent = "", 0.0
        try:
            while True:
                event = self._event(watcher.take())
                if event != said:
                    yield f"data: {event}\n\n"
                    said, silent = event, 0.0
                elif silent >= SILENCE_SECONDS:
                    yield ":\n\n"
                    silent = 0.0
                done, _ = await asyncio.wait(
                    over, timeout=PERIOD_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                silent += PERIOD_SECONDS
                if done:
                    return
        finally:
            for task in over:
                task.cancel()
            self._watchers.remove(watcher)
            if not self._watchers:
                self._pager.watcher = None

    def _event(self, marks: list[np.ndarray]) -> str:
        rows = []
        for kinds, resident in zip(marks, self._pager.policy.resident, strict=True):
            kinds[[expert for expert in tuple(resident) if not kinds[expert]]] = RESIDENT
            rows.append(LETTERS[kinds].tobytes().decode())
        counted = self._pager.statistics
        phases = {
            phase: {
                "tokens": getattr(counted, f"{phase}_tokens"),
                "hits": getattr(counted, f"{phase}_hits"),
                "misses": getattr(counted, f"{phase}_loads"),
                "bytes": getattr(counted, f"{phase}_bytes"),
            }
            for phase in ("prefill", "decode")
        }
        preload = {"loads": counted.preload_loads, "bytes": counted.preload_bytes}
        slots = sum(bank.buffer.count for bank in self._pager.banks)
        return json.dumps({"layers": rows, "slots": slots, **phases, "preload": preload})
