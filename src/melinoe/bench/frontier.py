"""`melinoe tune --sweep`: what quality pays for locality, point by point, with the control at the origin.

    for every point and seed: tune -> merge -> measure on held-out rows, a process each (point.py)
    then: ratios to the control of the same seed, pooled over seeds -> result.json, table.md, frontier.html

Points that are finished stay in OUTPUT/points, named by a hash of model, data, settings and seed, and are
reused; so a sweep that was stopped goes on, and one that got more points, seeds or budgets runs those.
A change of the code is not in the hash: take a new output folder for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import melinoe
from melinoe.bench.frontier_report import write_frontier
from melinoe.bench.held_out import held_out_only, hold_out
from melinoe.bench.point import JOB, Job
from melinoe.bench.points import CONTROL, Point, read_points
from melinoe.bench.setting import machine, mixture_shape
from melinoe.bench.stages import Stages, Verb, run_verbs
from melinoe.bench.teacher_forced import Measuring, compare, pooled, summary
from melinoe.config import resolve_model
from melinoe.errors import MelinoeError, missing_extra
from melinoe.offload.convert import local_folder

FORMAT, VERSION = "melinoe-frontier", "1"
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
    def measured(self) -> dict[str, Any] | None:
        path = self.folder / self.job.output
        return json.loads(path.read_text()) if path.is_file() else None


def sweep(
    model: str | Path,
    data: str | Path | list[str | Path],
    output_dir: str | Path,
    points: str | Path | list[dict[str, Any]] = "default",
    *,
    common: dict[str, Any] | None = None,
    seeds: list[int] | tuple[int, ...] = (0,),
    hold_out_rows: int = 0,
    limit: int | None = None,
    out_of_domain: str | Path | None = None,
    slots: list[int] | None = None,
    policies: tuple[str, ...] = ("decay", "lru"),
    exact_rows: int = 0,
    predictor_rows: int = 0,
    at_once: int | None = None,
    keep_merged: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Tunes every point with every seed and measures them all on the same held-out rows.

    Args:
        model: checkpoint folder, Hub id, or `tiny`.
        data: a folder of train and test.jsonl, or several, which are then one.
        output_dir: result.json, table.md, frontier.html, and the points.
        points: a file, a list of {"name", settings ...} or `default` (points.py).
        common: settings of all points, under those of each point.
        seeds: of tuning.
        hold_out_rows: rows at the end of each train split that are measured on instead of trained on.
        limit: at most this many held-out rows, evenly spaced.
        out_of_domain: other data that is only measured on (its test split).
        slots: budgets per layer; None: an eighth, a quarter and half of the experts, at least K.
        policies: of the simulator.  exact_rows, predictor_rows: see `teacher_forced.Measuring`.
        at_once: processes side by side; None: one per core, at most two.
        keep_merged: leave the merged checkpoints in OUTPUT/points.
        progress: a line on stderr for every run.

    Returns:
        What result.json holds: {"format", "version", "settings", "machine", "base", "points": [{"name",
        "curve", "settings", "held_out": {"pooled", "to_control", "seeds"}, ...}]}.

    Raises:
        MelinoeError: a bad sweep, settings, model or data, or a point that failed; finished ones are kept.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "report")
    if not seeds or len(set(seeds)) != len(seeds):
        raise MelinoeError("sweep: seeds", got=list(seeds), allowed="one or more, each once")
    chosen, source = read_points(points, common), local_folder(resolve_model(model))
    shape = mixture_shape(source)
    for point in chosen:
        point.tune_settings(0).capacity(shape["num_experts"], shape["experts_per_token"])
    output = _output_folder(Path(output_dir))
    held_out = {IN_DOMAIN: output / "data"}
    rows = {IN_DOMAIN: hold_out(_list(data), hold_out_rows, limit, output / "data")}
    if out_of_domain is not None:
        held_out[OUT_OF_DOMAIN] = output / "out-of-domain"
        rows[OUT_OF_DOMAIN] = held_out_only(out_of_domain, limit, held_out[OUT_OF_DOMAIN])
    measuring = Measuring(_budgets(slots, shape), tuple(policies), exact_rows, predictor_rows)
    runs = _plan(str(source), chosen, seeds, held_out, measuring, output / "points", keep_merged)
    stages = Stages(len(runs), progress)
    _run_all(runs, stages, at_once or min(2, len(os.sched_getaffinity(0))))
    result = {
        "format": FORMAT,
        "version": VERSION,
        "settings": {
            "model": str(model),
            "data": [str(folder) for folder in _list(data)],
            "out_of_domain": None if out_of_domain is None else str(out_of_domain),
            "seeds": list(seeds),
            "hold_out_rows": hold_out_rows,
            "rows": rows,
            "slots": chosen[0].tune_settings(0).capacity(shape["num_experts"], shape["experts_per_token"]),
            **shape,
            **measuring.as_dict(),
        },
        "machine": machine() | {"melinoe": melinoe.__version__},
        **_tables(runs, chosen, list(held_out)),
        "seconds": stages.seconds,
    }
    partial = output / "result.json.partial"
    partial.write_text(json.dumps(result, indent=1, default=float))
    partial.replace(output / "result.json")
    write_frontier(result, output)
    return result


def _list(data: str | Path | list[str | Path]) -> list[str | Path]:
    return list(data) if isinstance(data, list | tuple) else [data]


def _output_folder(output: Path) -> Path:
    """The folder of a new sweep or of one that goes on."""
    if output.exists() and not output.is_dir():
        raise MelinoeError(f"{output} is a file", allowed="a folder for the sweep")
    if output.is_dir() and any(output.iterdir()) and not (output / "points").is_dir():
        raise MelinoeError(f"{output} holds something else than a sweep", next_step="choose another folder")
    (output / "points").mkdir(parents=True, exist_ok=True)
    return output


def _budgets(slots: list[int] | None, shape: dict[str, int]) -> tuple[int, ...]:
    experts, top_k = shape["num_experts"], shape["experts_per_token"]
    if slots is None:
        return tuple(sorted({max(top_k, experts // part) for part in (8, 4, 2)}))
    if not slots or min(slots) < 1 or max(slots) > experts:
        raise MelinoeError("sweep: slots per layer", got=slots, allowed=f"1 .. {experts}")
    return tuple(sorted(set(slots)))


def _plan(
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
        tests_of = {name: str(data) for name, data in held_out.items()}
        job = Job(
            source, settings, str(held_out[IN_DOMAIN]), tests_of, measuring.as_dict(), output, keep_merged
        )
        runs.append(Run(point, seed, job, where))
    return runs


def _digest(*groups: Any) -> str:
    digest = hashlib.sha256()
    for file in sorted(file for group in groups for file in group):
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _run_all(runs: list[Run], stages: Stages, at_once: int) -> None:
    """Does the runs that are not finished, and says so one by one."""
    left = []
    for run in runs:
        if run.measured is not None:
            stages.start(f"{run.label}: finished before")
            continue
        run.folder.mkdir(exist_ok=True)
        (run.folder / JOB).write_text(json.dumps(asdict(run.job), indent=1))
        left.append(run)
    logs = runs[0].folder.parent
    stages.note(f"{len(left)} runs to do, {at_once} at once")

    def done(position: int, _: dict[str, Any]) -> None:
        run = left[position]
        stages.start(f"{run.label}: {_short(run, runs)}")

    verbs = [Verb(run.folder.name, [str(run.folder / JOB)], module="melinoe.bench.point") for run in left]
    run_verbs(verbs, logs, at_once, done)


def _short(run: Run, runs: list[Run]) -> str:
    """What the terminal says of a finished run."""
    measured = run.measured
    assert measured is not None
    sums = pooled([measured[IN_DOMAIN_KEY][IN_DOMAIN]["sums"]])
    control = next((r for r in runs if r.seed == run.seed and r.point and r.point.name == CONTROL), None)
    before = control.measured if control is not None and control is not run else None
    if before is None:
        found = summary(sums)
        return f"perplexity {found['perplexity']:.4f}"
    ratios = compare(sums, pooled([before[IN_DOMAIN_KEY][IN_DOMAIN]["sums"]]))
    loads = ", ".join(
        f"{row['policy']} {row['slots']}: {row['ratio']:.3f}"
        for row in ratios["loads"]
        if row["policy"] == ratios["loads"][0]["policy"]
    )
    return f"perplexity x{ratios['perplexity']['ratio']:.4f}, loads {loads}"


IN_DOMAIN_KEY = "held_out"  # of a measurement: {name: what was measured on that data}


def _tables(runs: list[Run], points: list[Point], data: list[str]) -> dict[str, Any]:
    """Base and points, on each of the data, per seed and pooled."""
    base = runs[0].measured
    assert base is not None
    rows = []
    for point in points:
        mine = [run for run in runs if run.point == point]
        controls = {run.seed: run for run in runs if run.point is not None and run.point.name == CONTROL}
        row: dict[str, Any] = {"name": point.name, "curve": point.curve, "settings": point.settings}
        row["tuned"] = [_measured(run)["tuned"] for run in mine]
        row["predictor"] = [_measured(run)["predictor"] for run in mine]
        for name in data:
            own = [_measured(run)[IN_DOMAIN_KEY][name] for run in mine]
            other = [_measured(controls[run.seed])[IN_DOMAIN_KEY][name] for run in mine]
            row[name] = _pool(own, other) | {
                "seeds": [
                    {"seed": run.seed} | _pool([a], [b]) for run, a, b in zip(mine, own, other, strict=True)
                ]
            }
        rows.append(row)
    first = [_measured(run) for run in runs if run.point is not None and run.point.name == CONTROL]
    return {
        "base": {
            name: _pool([base[IN_DOMAIN_KEY][name]] * len(first), [c[IN_DOMAIN_KEY][name] for c in first])
            for name in data
        },
        "points": rows,
    }


def _measured(run: Run) -> dict[str, Any]:
    measured = run.measured
    assert measured is not None, run.label
    return measured


def _pool(own: list[dict[str, Any]], control: list[dict[str, Any]]) -> dict[str, Any]:
    """Several seeds as one: sums of sums over the same sequences; entropies are means over seeds."""
    mine = pooled([one["sums"] for one in own])
    layers = [sum(values) / len(own) for values in zip(*(one["load_entropy"] for one in own), strict=True)]
    found = summary(mine) | {"load_entropy": sum(layers) / len(layers), "load_entropy_layers": layers}
    if all("judged" in one for one in own):
        found["judged"] = {
            name: sum(one["judged"][name] for one in own) / len(own) for name in own[0]["judged"]
        }
    return found | {"to_control": compare(mine, pooled([one["sums"] for one in control]))}
