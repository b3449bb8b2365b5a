"""Who is computed, who waits, and who is told to come back later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from melinoe.serving.http.errors import ApiError


class Admission:
    """Counts prompts. Belongs to one event loop.

    Args:
        concurrency: prompts that are computed together.
        queue: prompts that may wait besides.
    """

    def __init__(self, concurrency: int, queue: int) -> None:
        self.concurrency, self.queue = concurrency, queue
        self.running = self.waiting = 0
        self._places = asyncio.Semaphore(concurrency)

    def enter(self, count: int) -> None:
        """Takes places in the queue; each is given up by `leave` or turned into one of `running`.

        Raises:
            ApiError: 429.
        """
        if self.running + self.waiting + count > self.concurrency + self.queue:
            raise ApiError(
                429,
                f"the server is busy: {self.running} prompts are computed and {self.waiting} wait, of at most"
                f" {self.concurrency} and {self.queue}",
                "rate_limit_error",
                code="server_busy",
            )
        self.waiting += count

    def leave(self, count: int) -> None:
        """Gives up places in the queue."""
        self.waiting -= count

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """From waiting to running, in the order of coming. Whoever enters here has a place in the queue."""
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()
