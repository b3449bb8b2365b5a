"""The rows take turns, each in a process of its own, and every run is a file that a later call finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melinoe.benchmark.entries import ACCELERATE, LLAMA_CPP, OURS, RESIDENT, Entry
from melinoe.benchmark.folder import slug
from melinoe.benchmark.predicted import budget_of, predict
from melinoe.benchmark.prepare import Arena, ends_of
from melinoe.benchmark.quality import key_of
from melinoe.benchmark.run_entry import Task
from melinoe.benchmark.summary import SPEED, summarise
from melinoe.config import format_rate
from melinoe.demonstration.limited_process import MemoryLimit, run_module
from melinoe.demonstration.race import drop_page_cache
from melinoe.errors import MelinoeError
from melinoe.files import write_json

Runs = dict[str, list[dict[str, Any]]]  # of each row, by its name: what run_entry printed, and its peak bytes


@dataclass(frozen=True)
class Size:
    """How much is measured. seconds: after which a request of a slow row is cut."""

    repeats: int = 5
    prompts: int = 2
    new_tokens: int = 32
    seconds: float = 12.0
    quality_rows: int = 48

    def __post_init__(self) -> None:
        for name in ("repeats", "prompts"):
            if getattr(self, name) < 1:
                raise MelinoeError(
                    f"bench: {name} is too small", got=getattr(self, name), allowed="1 or more"
                )
        if self.new_tokens < 2:
            raise MelinoeError("bench: new_tokens is too small", got=self.new_tokens, allowed="2 or more")


@dataclass(frozen=True)
class Turns:
    """What all processes have in common.

    output: the bench's folder. limit: of memory. note: told of each.
    """

    arena: Arena
    output: Path
    limit: MemoryLimit
    prompts: list[list[int]]
    predictor: str | None
    size: Size
    threads: int
    note: Callable[[str], None]

    def run(self, rows: list[Entry]) -> tuple[Runs, list[dict[str, Any]]]:
        """Runs all rows, forwards and backwards; one that fails is left out, and stands in arena.skipped.

        Returns:
            The runs, and what `plan` had predicted before each repeat.
        """
        runs: Runs = {row.name: [] for row in rows}
        predicted = []
        failed: dict[str, str] = {}
        for repeat in range(self.size.repeats):
            if any(row.kind == OURS for row in rows):
                predicted.append(self._predict(repeat))
            for row in rows if repeat % 2 == 0 else rows[::-1]:
                if row.name in failed:
                    continue
                try:
                    runs[row.name].append(self._run(row, repeat))
                except MelinoeError as error:
                    failed[row.name] = str(error)
                    self.note(failed[row.name])
        self.arena.skipped.update(failed)
        return {name: found for name, found in runs.items() if name not in failed}, predicted

    def _predict(self, repeat: int) -> dict[str, Any]:
        file = self.output / "predicted" / f"{repeat}.json"
        context = max(map(len, self.prompts)) + self.size.new_tokens
        return predict(file, self.arena.store.folder, self.limit.limit_bytes, context, self.threads)

    def _run(self, row: Entry, repeat: int) -> dict[str, Any]:
        file = self.output / "runs" / f"{repeat}-{slug(row.name)}.json"
        if file.is_file():
            before: dict[str, Any] = json.loads(file.read_text())
            return before
        # what is in the page cache already is not charged to the limit of who reads it
        drop_page_cache(self.arena.folder, *self.arena.checkpoints.values())
        under = self.limit if row.limited and self.limit.available else None
        if under is not None:
            under.peak_bytes()  # forgets the peak of whoever ran before
        module, task = "melinoe.benchmark.run_entry", self.arena.folder / "task.json"
        found = run_module(module, self._task(row).to_json(), task, under, repr(row.name))
        found["peak_bytes"] = under.peak_bytes() if under is not None else None
        write_json(file, found)
        self.note(
            f"{repeat + 1}/{self.size.repeats} {row.name}: {format_rate(summarise([found])[SPEED])} tok/s"
        )
        return found

    def _task(self, row: Entry) -> Task:
        common: dict[str, Any] = {
            "kind": row.kind,
            "prompts": self.prompts,
            "new_tokens": self.size.new_tokens,
            "seconds": self.size.seconds,
            "threads": self.threads,
        }
        checkpoint, limit_bytes = self.arena.checkpoints[row.weights], self.limit.limit_bytes
        if row.kind == LLAMA_CPP:
            path = self.arena.gguf[row.weights, row.precision]
            fits = 2 * path.stat().st_size < limit_bytes  # the mapped file and what is laid out anew of it
            return Task(path=str(path), repack=fits, ends=ends_of(checkpoint), **common)
        if row.kind in (RESIDENT, ACCELERATE):
            return Task(path=str(checkpoint), offload_folder=str(self.arena.offload), **common)
        assert row.kind == OURS
        return Task(
            path=str(self.arena.stores[row.weights, row.precision]),
            memory=None if row.slots is not None else budget_of(limit_bytes),
            slots=row.slots,
            policy=row.policy,
            predictor=self.predictor if row.predicted else None,
            **common,
        )


def agreement(row: Entry, runs: Runs, rows: list[Entry]) -> dict[str, Any]:
    """How many answers are those of the first row of ours with the same weights and precision.

    Raises:
        MelinoeError: one of ours gave another token: paging must not change a result.
    """
    own = [one["tokens"] for run in runs[row.name] for one in run["requests"]]
    alike = [one for one in rows if one.kind == OURS and key_of(one) == key_of(row)]
    if not alike:
        return {"answers_equal": None}
    reference = [one["tokens"] for one in runs[alike[0].name][0]["requests"]]
    references = reference * (len(own) // len(reference))
    equal = sum(a[: len(b)] == b[: len(a)] for a, b in zip(own, references, strict=True))
    if row.kind == OURS and equal < len(own):
        raise MelinoeError(
            f"{row.name} generated other tokens than {alike[0].name}",
            got=f"{len(own) - equal} of {len(own)} answers",
            next_step="this is a mistake of melinoe's: please report it",
        )
    return {"answers_equal": equal / len(own)}
