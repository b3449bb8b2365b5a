"""The runs of a sweep: which there are, which are finished, and doing the rest, a process each.

A run is known by a hash of model, train rows, settings and seed, and its measurements by one of the
held-out rows and of what is measured. So more points, seeds, rows or budgets cost what they add.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from melinoe.files import write_json
from melinoe.frontier.measuring import Measuring
from melinoe.frontier.points import CONTROL, Point
from melinoe.frontier.run_point import JOB, Job
from melinoe.frontier.sources import measuring_code, tuning_code
from melinoe.frontier.sums import Sums, compare, summary
from melinoe.verbs import Stages, Verb, run_verbs

VERSION = "2"  # of the measurements; part of their hash, so that those of another form are made again
IN_DOMAIN, OUT_OF_DOMAIN = "held_out", "out_of_domain"


@dataclass(frozen=True)
class Run:
    """One process of the sweep. point None: the base, measured as it is."""

    point: Point | None
    seed: int | None
    job: Job
    folder: Path

    @property
    def label(self) -> str:
        return "base" if self.point is None else f"{self.point.name}, seed {self.seed}"

    @property
    def is_finished(self) -> bool:
        return (self.folder / self.job.output).is_file()

    @property
    def measured(self) -> dict[str, Any]:
        """What `run_point.run` left. Only of a finished run."""
        return json.loads((self.folder / self.job.output).read_text())

    @property
    def sums(self) -> Sums:
        """On the held-out rows of the data that it was tuned on."""
        return Sums.from_json(self.measured["data"][IN_DOMAIN]["sums"])


def runs_of(
    source: str,
    points: list[Point],
    seeds: list[int] | tuple[int, ...],
    held_out: dict[str, Path],
    measuring: Measuring,
    folder: Path,
    keep_merged: bool,
) -> list[Run]:
    """The base, then seed by seed, its control first."""
    base = _digest(Path(source).glob("*.safetensors"), Path(source).glob("*.json"))
    train = _digest([held_out[IN_DOMAIN] / "train.jsonl"])
    tests = {name: _digest([data / "test.jsonl"]) for name, data in held_out.items()}
    what = {"measuring": measuring.as_dict(), "held_out": tests, "version": VERSION}
    if measuring.predictor_rows:
        what["train"] = train
    output = f"measured-{_key(what)}.json"
    runs = []
    for seed, point in [(None, None), *((seed, point) for seed in seeds for point in points)]:
        settings = point.tune_settings(seed).as_dict() if point is not None and seed is not None else None
        key = _key({"base": base, "train": train if settings else "", "settings": settings})
        name = "base" if point is None else f"{point.name}-seed-{seed}"
        found = sorted(folder.glob(f"*-{key}"))  # the same run under another name
        where = found[0] if found else folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{key}"
        measured_on = {name: str(data) for name, data in held_out.items()}
        job = Job(
            source, settings, str(held_out[IN_DOMAIN]), measured_on, measuring.as_dict(), output, keep_merged
        )
        runs.append(Run(point, seed, job, where))
    return runs


def _digest(*groups: Iterable[Path]) -> str:
    """A digest of the names and contents of files."""
    digest = hashlib.sha256()
    for file in sorted(file for group in groups for file in group):
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def run_all(runs: list[Run], stages: Stages, at_once: int) -> None:
    """Does the runs that are not finished, and says so one by one."""
    left, tuned_by, measured_by = [], tuning_code(), measuring_code()
    for run in runs:
        if run.is_finished:
            found = run.measured
            other = run.point is not None and found.get("code") != tuned_by
            other = other or found.get("measured_by") != measured_by
            stages.start(
                f"{run.label}: finished before" + (" with other code: compare with care" if other else "")
            )
            continue
        write_json(run.folder / JOB, asdict(run.job), indent=1)
        left.append(run)
    logs = runs[0].folder.parent
    stages.note(f"{len(left)} runs to do, {at_once} at once")

    def done(position: int, _: dict[str, Any]) -> None:
        run = left[position]
        stages.start(f"{run.label}: {_short(run, runs)}")

    verbs = [
        Verb(run.folder.name, [str(run.folder / JOB)], module="melinoe.frontier.run_point") for run in left
    ]
    run_verbs(verbs, logs, at_once, done)


def _short(run: Run, runs: list[Run]) -> str:
    """What the terminal says of a finished run."""
    control = control_of(run, runs)
    if control is None or control is run or not control.is_finished:
        return f"perplexity {summary(run.sums)['perplexity']:.4f}"
    ratios = compare(run.sums, control.sums)
    first = ratios["loads"][0]["policy"]
    loads = [f"{row['ratio']:.3f} at {row['slots']}" for row in ratios["loads"] if row["policy"] == first]
    return f"perplexity x{ratios['perplexity']['ratio']:.4f}, {first} loads x{', '.join(loads)}"


def control_of(run: Run, runs: list[Run]) -> Run | None:
    """The control of the same seed; None for the base."""
    controls = (one for one in runs if one.point is not None and one.point.name == CONTROL)
    return next((one for one in controls if one.seed == run.seed), None)
