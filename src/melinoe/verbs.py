"""Runs verbs of the command line as processes, a few at a time: the demo does what a user would type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from melinoe.errors import MelinoeError

TELL_SECONDS = 60  # between two lines about what is running, where there is no terminal


@dataclass(frozen=True)
class Verb:
    """One call of the command line. label: what people read; arguments: verb and options.

    module: what `python -m` runs; another one than melinoe understands --json and --quiet as well.
    """

    label: str
    arguments: list[str]
    module: str = "melinoe"


class Stages:
    """Says what is going on, one line per stage with its time, on stderr."""

    def __init__(self, total: int, show: bool = True) -> None:
        self.console = Console(stderr=True, quiet=not show)
        self.total, self.number = total, 0
        self.began = time.perf_counter()

    def start(self, text: str) -> None:
        self.number += 1
        elapsed = time.perf_counter() - self.began
        self.console.print(
            f"[bold]\\[{self.number}/{self.total}][/bold] {escape(text)} [dim]({elapsed:.0f} s)[/dim]",
            highlight=False,
            soft_wrap=True,
        )

    def note(self, text: str) -> None:
        self.console.print(f"      [dim]{escape(text)}[/dim]", highlight=False, soft_wrap=True)

    @contextmanager
    def waiting(self) -> Iterator[Callable[[list[str]], None]]:
        """Gives what is to be called with the names of the verbs that run, as often as one likes: on a
        terminal a line says how long they have been running, elsewhere one comes every minute."""
        began = told = time.perf_counter()
        if self.console.is_terminal:
            with self.console.status("") as status:
                yield lambda names: status.update(_since(names, began))
            return

        def tell(names: list[str]) -> None:
            nonlocal told
            if time.perf_counter() - told >= TELL_SECONDS:
                told = time.perf_counter()
                self.note(_since(names, began))

        yield tell

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


def _since(names: list[str], began: float) -> str:
    return f"{', '.join(names)}: {time.perf_counter() - began:.0f} s"


def run_verbs(
    verbs: list[Verb],
    logs: Path,
    at_once: int = 2,
    done: Callable[[int, dict[str, Any]], None] | None = None,
    stages: Stages | None = None,
) -> list[dict[str, Any]]:
    """Runs verbs, at most `at_once` together, one thread each; returns what their --json lines say.

    Args:
        logs: folder for what each writes to stderr.
        done: called with position and result as each verb ends.
        stages: where to say what is running and for how long.

    Raises:
        MelinoeError: a verb failed; its own last line is in the message.
        KeyboardInterrupt: Ctrl-C; the processes are stopped and waited for first.
    """
    waiting = list(enumerate(verbs))
    running: dict[int, tuple[subprocess.Popen[str], Path]] = {}
    results: dict[int, dict[str, Any]] = {}
    try:
        with stages.waiting() if stages else nullcontext(lambda names: None) as tell:
            while waiting or running:
                while waiting and len(running) < at_once:
                    index, verb = waiting.pop(0)
                    running[index] = _start(verb, logs)
                time.sleep(0.05)
                tell([verbs[index].label for index in running])
                for index in [one for one, (process, _) in running.items() if process.poll() is not None]:
                    results[index] = _result(verbs[index], *running.pop(index))
                    if done is not None:
                        done(index, results[index])
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    return [results[index] for index in range(len(verbs))]


def _start(verb: Verb, logs: Path) -> tuple[subprocess.Popen[str], Path]:
    """The process, and the file that takes what it writes to stderr."""
    log = logs / f"{verb.label.replace(' ', '-')}.log"
    command = [sys.executable, "-m", verb.module, *verb.arguments, "--json", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    return process, log


def _result(verb: Verb, process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """What a process that has ended printed as its --json line."""
    output = process.stdout.read() if process.stdout else ""
    if process.returncode != 0:
        lines = log.read_text().strip().splitlines() or ["no message"]
        raise MelinoeError(f"{verb.label} failed", got=lines[-1])
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found
