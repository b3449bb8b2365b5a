"""All prompts of one HTTP request on their way: waiting, computing, cancelled when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from melinoe.errors import MelinoeError
from melinoe.serving.engine.interface import Engine
from melinoe.serving.engine.request import EngineRequest, Progress
from melinoe.serving.http.admission import Admission
from melinoe.serving.http.errors import INTERNAL, ApiError, unavailable


class ClientGoneError(Exception):
    """Nobody waits for the answer."""


Item = tuple[int, Progress]


class Answer:
    """Progress of every prompt as it comes, with its number.

    Args:
        engine: computes.
        admission: says when.
        prompts: how many; each takes a place in the queue now.
        deadline: on the event loop's clock.

    `requests` is filled before `start`, with requests that deliver to `deliver(number)`; `close` frees
    everything.

    Raises:
        ApiError: no place in the queue.
    """

    def __init__(self, engine: Engine, admission: Admission, prompts: int, deadline: float) -> None:
        admission.enter(prompts)
        self._engine, self._admission, self._places = engine, admission, prompts
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Item | BaseException] = asyncio.Queue()
        self._timer = self._loop.call_at(deadline, self._items.put_nowait, _timed_out())
        self._tasks: list[asyncio.Task[None]] = []
        self.requests: list[EngineRequest] = []

    def deliver(self, number: int) -> Callable[[Progress], None]:
        """For an engine's thread."""

        def put(progress: Progress) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._items.put_nowait, (number, progress))

        return put

    def start(self, client_left: Callable[[], Awaitable[Any]]) -> None:
        """Starts all requests, each as soon as it has its place, and watches the client.

        Args:
            client_left: returns when the client does not listen any more.
        """
        self._ended = [asyncio.Event() for _ in self.requests]
        self._tasks = [self._loop.create_task(self._run(number)) for number in range(len(self.requests))]
        self._tasks.append(self._loop.create_task(self._watch(client_left)))

    async def _watch(self, client_left: Callable[[], Awaitable[Any]]) -> None:
        await client_left()
        self._items.put_nowait(ClientGoneError())

    async def _run(self, number: int) -> None:
        request = self.requests[number]
        self._places -= 1  # from here on `place` keeps count
        async with self._admission.place():
            try:
                self._engine.submit(request)
                await self._ended[number].wait()
            except MelinoeError as error:
                self._items.put_nowait((number, Progress(error=error)))
            finally:
                if not self._ended[number].is_set():
                    self._engine.cancel(request)

    async def progress(self) -> AsyncIterator[Item]:
        """Until every prompt has ended.

        Raises:
            ApiError: the time is up, or the engine failed.
            ClientGoneError: the client has left.
        """
        left = len(self.requests)
        while left:
            item = await self._items.get()
            if isinstance(item, BaseException):
                raise item
            number, progress = item
            if progress.error is not None:
                self._ended[number].set()
                raise self._explain(progress.error)
            if progress.finish_reason is not None:
                self._ended[number].set()
                left -= 1
            yield item

    def _explain(self, error: BaseException) -> ApiError:
        if self._engine.failure is not None or isinstance(error, MelinoeError):
            return unavailable(self._engine.failure or str(error))
        reason = " ".join(str(error).split()) or type(error).__name__
        return ApiError(500, f"the answer could not be computed: {reason}", INTERNAL, code="internal_error")

    def close(self) -> None:
        """Frees what is still being done for this answer."""
        self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        self._admission.leave(self._places)
        self._places = 0


def _timed_out() -> ApiError:
    return ApiError(504, "the answer took longer than a request may", "timeout_error", code="request_timeout")
