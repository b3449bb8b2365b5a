"""What an engine is: it takes requests and advances them in a thread of its own."""

from __future__ import annotations

from typing import Protocol

from melinoe.serving.engine.request import EngineRequest


class Engine(Protocol):
    """Either way of computing answers.

    name: for people. capacity: tokens that the longest prompt and its answer may have together.
    """

    name: str
    capacity: int

    def start(self) -> None:
        """Starts its thread.

        Raises:
            Exception: the model cannot be run this way; the message says why.
        """

    def submit(self, request: EngineRequest) -> None:
        """Takes a request; returns at once.

        Raises:
            MelinoeError: the engine has failed or was stopped.
        """

    def cancel(self, request: EngineRequest) -> None:
        """Forgets a request: it is not advanced any further after the current step. Returns at once."""

    @property
    def failure(self) -> str | None:
        """Why no request can be answered any more, in one line; None: all is well."""

    @property
    def cache_use(self) -> float:
        """Share of the KV cache that running requests hold, 0 to 1."""

    def stop(self) -> None:
        """Ends its thread; what still runs fails."""
