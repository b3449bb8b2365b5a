"""The live line on stderr while tuning runs: loss, nats per completion token, expected misses, ETA."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SMOOTHING = 0.9


class TuningProgress:
    """A rich progress bar; silent where `show` is false. Used as a context manager."""

    def __init__(self, show: bool, max_steps: int) -> None:
        self.max_steps = max_steps
        self.smooth: dict[str, float] = {}
        self.held_out = ""
        self.bar = Progress(
            TextColumn("tune"),
            BarColumn(bar_width=10),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not show,
        )
        self.task = self.bar.add_task("tune", total=1.0, text="starting")

    def __enter__(self) -> TuningProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, record: dict[str, Any], share: float) -> None:
        """Shows running means of one losses.jsonl record."""
        for name in ("total", "nll", "misses"):
            value = record[name]
            if value is not None:
                self.smooth[name] = SMOOTHING * self.smooth.get(name, value) + (1 - SMOOTHING) * value
        text = (
            f"step {record['step']}/{self.max_steps} loss {self.smooth.get('total', float('nan')):.3f}"
            f" nll {self.smooth.get('nll', float('nan')):.3f}"
            f" misses {self.smooth.get('misses', float('nan')):.2f}"
        )
        if record["skipped"]:
            text += " (not finite: skipped)"
        text += self.held_out
        self.bar.update(self.task, completed=share, text=text)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Keeps the numbers of one evaluations.jsonl record in the line."""
        parts = [
            f"{label} {record[name]:.3g}"
            for name, label in (("nll", "nll"), ("hit_rate", "hits"), ("loads_per_token", "loads"))
            if record[name] is not None
        ]
        self.held_out = " | held out " + " ".join(parts)


@contextlib.contextmanager
def trainer_silenced() -> Iterator[None]:
    """Keeps Trainer's remarks (INFO and WARNING of its loggers) out of our progress line."""
    loggers = [logging.getLogger(name) for name in ("transformers.trainer", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
