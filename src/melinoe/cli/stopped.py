"""What Ctrl-C leaves: the last line of a verb that was stopped says what is kept, and only what is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

NOTHING = "nothing is kept to go on with"


@contextmanager
def saying_what_is_kept(kept: Callable[[], str | None]) -> Iterator[None]:
    """Around the work of a verb that can be gone on with.

    Args:
        kept: asked when it is stopped: what the same call goes on with; None where it starts anew.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        said = kept()
        if said is not None:
            stop.add_note(said)
        raise


def stopped_line(stop: KeyboardInterrupt) -> str:
    """The line that the terminal shows."""
    return "; ".join(["stopped", *getattr(stop, "__notes__", [NOTHING])])
