"""Ctrl-C that is not lost.

Python drops a KeyboardInterrupt that is raised while it cleans an object up: in a finaliser, or in a callback
of a weak reference. A long run on a busy machine was seen to go on behind one.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback


@contextmanager
def noticing_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C does what it did, and is remembered.

    Yields:
        A function that raises KeyboardInterrupt if there was one since.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    seen, before = False, signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: Any) -> None:
        nonlocal seen
        seen = True
        if callable(before):
            before(number, frame)

    def again() -> None:
        if seen and callable(before):
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, remember)
    try:
        yield again
    finally:
        signal.signal(signal.SIGINT, before)


class StopBetweenSteps(TrainerCallback):
    """Ends a run behind the step in which a Ctrl-C was lost."""

    def __init__(self, again: Callable[[], None]) -> None:
        self._again = again

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        self._again()
