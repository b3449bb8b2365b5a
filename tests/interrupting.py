"""Ctrl-C in the middle of a tuning run, for the tests of resuming."""

import contextlib
from collections.abc import Iterator

import pytest

from melinoe.tuning.trainer import LocalityTrainer


@contextlib.contextmanager
def interrupted_at(batch: int) -> Iterator[None]:
    """Inside, the loss of that batch (from 1) raises KeyboardInterrupt, which must come out of the block."""
    original, calls = LocalityTrainer.compute_loss, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == batch:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    LocalityTrainer.compute_loss = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        LocalityTrainer.compute_loss = original
