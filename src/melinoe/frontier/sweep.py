"""`melinoe tune --sweep`: what quality pays for locality, point by point, with the control at the origin.

    for every point and seed: tune -> merge -> measure on held-out rows, a process each (run_point.py)
    then: ratios to the control of the same seed, pooled over seeds -> result.json, table.md, frontier.html

Points that are finished stay in OUTPUT/points, named by a hash of model, data, settings and seed, and are
reused; so a sweep that was stopped goes on, and one that got more points, seeds or budgets runs those.
A change of the code is not in the hash: such a run is named, and a new output folder leaves it behind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from melinoe._version import __version__
from melinoe.conversion.checkpoint import Checkpoint
from melinoe.errors import MelinoeError
from melinoe.files import NEW, write_json
from melinoe.frontier.held_out import held_out_only, hold_out, write_split
from melinoe.frontier.measuring import Measuring
from melinoe.frontier.page import write_frontier
from melinoe.frontier.points import Point, read_sweep
from melinoe.frontier.run_point import JOB
from melinoe.frontier.runs import IN_DOMAIN, OUT_OF_DOMAIN, Run, control_of, run_all, runs_of
from melinoe.frontier.sums import Sums, compare, pooled, summary
from melinoe.models.folder import local_folder, resolve_model
from melinoe.outputs import Kind, Output
from melinoe.report.setting import commit, machine
from melinoe.verbs import Stages

FORMAT, VERSION = "melinoe-frontier", "1"
CURVE_POINTS = 150  # of a curve of tuning in result.json


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
    policies: list[str] | None = None,
    exact_rows: int | None = None,
    predictor_rows: int | None = None,
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
        policies: of the simulator, the first is the plot's; None: decay and lru.
        exact_rows, predictor_rows: see `measuring.Measuring`; None: 0. What the file of points says of
            these four holds where they are None.
        at_once: processes side by side; None: one per core, at most two.
        keep_merged: leave the merged checkpoints in OUTPUT/points.
        progress: a line on stderr for every run.

    Returns:
        What result.json holds: {"format", "version", "settings", "machine", "base", "points": [{"name",
        "curve", "settings", "tuned", "held_out": {"perplexity", "loads", "static", "load_entropy",
        "to_control", "seeds", ...}, "out_of_domain": the same}]}; docs/sweep.md describes it.

    Raises:
        MelinoeError: a bad sweep, settings, model or data, something else than a sweep at `output_dir`, or a
            point that failed; finished ones are kept.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise MelinoeError(
            "sweep: not a list of different seeds", got=list(seeds), allowed="one or more, each once"
        )
    chosen, measure = read_sweep(points, common)
    given = {"slots": slots, "policies": policies, "exact_rows": exact_rows, "predictor_rows": predictor_rows}
    measure |= {name: value for name, value in given.items() if value is not None}
    source = local_folder(resolve_model(model))
    shape = Checkpoint(source).shape
    for point in chosen:
        point.tune_settings(0).capacity(shape["num_experts"], shape["experts_per_token"])
    measuring = Measuring(_budgets(measure.pop("slots", None), shape), **measure)
    split = hold_out(_list(data), hold_out_rows, limit)
    tests, origins = {IN_DOMAIN: split.test}, {IN_DOMAIN: split.origin, OUT_OF_DOMAIN: []}
    if out_of_domain is not None:
        tests[OUT_OF_DOMAIN] = held_out_only(out_of_domain, limit)
    output = Path(output_dir)
    reads = {"model": source, "data": _list(data), "out-of-domain data": out_of_domain}
    Output(output, SWEEP, reads | ({"list of points": points} if points != "default" else {}), True).check()
    (output / "points").mkdir(parents=True, exist_ok=True)
    held_out = {name: output / "data" / name for name in tests}
    write_split(held_out[IN_DOMAIN], "train", split.train)
    for name, rows in tests.items():
        write_split(held_out[name], "test", rows)
    runs = runs_of(str(source), chosen, seeds, held_out, measuring, output / "points", keep_merged)
    stages = Stages(len(runs), progress)
    run_all(runs, stages, at_once or min(2, len(os.sched_getaffinity(0))))
    result = {
        "format": FORMAT,
        "version": VERSION,
        "settings": {
            "model": str(model),
            "data": [str(folder) for folder in _list(data)],
            "out_of_domain": None if out_of_domain is None else str(out_of_domain),
            "points": str(points) if isinstance(points, str | Path) else None,
            "common": common or {},
            "seeds": list(seeds),
            "hold_out_rows": hold_out_rows,
            "limit": limit,
            "train_rows": len(split.train),
            "rows": {name: len(lines) for name, lines in tests.items()},
            "slots": chosen[0].tune_settings(0).capacity(shape["num_experts"], shape["experts_per_token"]),
            **shape,
            **measuring.as_dict(),
        },
        "machine": machine() | {"melinoe": __version__, "commit": commit()},
        **_tables(runs, chosen, {name: origins[name] for name in held_out}),
        "seconds": stages.seconds,
    }
    write_json(output / "result.json", result, indent=1, default=float)
    write_frontier(result, output)
    return result


def _list(data: str | Path | list[str | Path]) -> list[str | Path]:
    return list(data) if isinstance(data, list | tuple) else [data]


def _no_sweep(output: Path) -> str:
    """What is wrong with a folder that a sweep would go on in; "" where it is one, finished or not."""
    points = output / "points"
    if not points.is_dir():
        return "a folder without the points of a sweep"
    for entry in points.iterdir():
        begun = entry.is_dir() and all(file.name.endswith(NEW) for file in entry.iterdir())
        if not (begun or (entry / JOB).is_file() or entry.suffix == ".log"):
            return f"{entry.relative_to(output)}, which is no run of a sweep"
    return ""


SWEEP = Kind("a sweep", True, _no_sweep)


def _budgets(slots: Any, shape: dict[str, int]) -> tuple[int, ...]:
    num_experts, top_k = shape["num_experts"], shape["experts_per_token"]
    if isinstance(slots, int):
        slots = [slots]
    if slots is None:
        return tuple(sorted({max(top_k, num_experts // part) for part in (8, 4, 2)}))
    if not slots or not all(isinstance(size, int) and 1 <= size <= num_experts for size in slots):
        raise MelinoeError("sweep: impossible slots per layer", got=slots, allowed=f"1 .. {num_experts}")
    return tuple(sorted(set(slots)))


def _tables(runs: list[Run], points: list[Point], data: dict[str, list[str]]) -> dict[str, Any]:
    """Base and points, on each of the data, per seed and pooled. data: by name, the origin of every row."""
    measured = {run.folder: run.measured for run in runs}
    base, *tuned = runs
    rows = []
    for point in points:
        mine = [run for run in tuned if run.point == point]
        controls = [control_of(run, runs) or run for run in mine]
        row: dict[str, Any] = {"name": point.name, "curve": point.curve, "settings": point.settings}
        for key in ("tuned", "code", "predictor"):
            row[key] = [measured[run.folder].get(key) for run in mine]
        row["curves"] = tuning_curves(mine[0].folder / "adapter" / "losses.jsonl")
        for name in data:
            own = [measured[run.folder]["data"][name] for run in mine]
            other = [measured[run.folder]["data"][name] for run in controls]
            seeds = [
                {"seed": run.seed, **_pool([a], [b])} for run, a, b in zip(mine, own, other, strict=True)
            ]
            row[name] = _pool(own, other, data[name]) | {"seeds": seeds}
        rows.append(row)
    first = [measured[run.folder]["data"] for run in tuned if run.point == points[0]]
    untouched = measured[base.folder]["data"]
    pairs = {name: _pool([untouched[name]] * len(first), [one[name] for one in first]) for name in data}
    return {"base": pairs, "points": rows}


def tuning_curves(log: Path) -> dict[str, list[float]]:
    """Of a log of losses, means of a few steps each: {"step", "nll", "misses"}; {} where there is no log.

    Steps that were skipped, whose losses were no numbers, are left out.
    """
    if not log.is_file():
        return {}
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if not line.get("skipped")]
    each = -(-len(lines) // CURVE_POINTS) or 1
    groups = [lines[first : first + each] for first in range(0, len(lines), each)]
    means: dict[str, list[float]] = {"step": [group[-1]["step"] for group in groups]}
    for key in ("nll", "misses"):
        means[key] = [round(sum(line[key] for line in group) / len(group), 6) for group in groups]
    return means


def _pool(
    own: list[dict[str, Any]], control: list[dict[str, Any]], origin: Sequence[str] = ()
) -> dict[str, Any]:
    """Several seeds as one: sums of sums over the same sequences; entropies are means over seeds.

    Of several origins also each by itself, unless rows were left out as too long: then nobody says which are
    whose.
    """
    mine, others = (pooled([Sums.from_json(one["sums"]) for one in side]) for side in (own, control))
    layers = [sum(values) / len(own) for values in zip(*(one["load_entropy"] for one in own), strict=True)]
    found = summary(mine) | {"load_entropy": sum(layers) / len(layers), "load_entropy_layers": layers}
    if all("judged" in one for one in own):
        found["judged"] = {
            name: sum(one["judged"][name] for one in own) / len(own) for name in own[0]["judged"]
        }
    sources = list(dict.fromkeys(origin))
    if len(sources) > 1 and len(origin) == found["num_sequences"]:
        found["origins"] = {}
        for source in sources:
            chosen = [name == source for name in origin]
            part, other = mine.only(chosen), others.only(chosen)
            found["origins"][source] = summary(part) | {"to_control": compare(part, other)}
    return found | {"to_control": compare(mine, others)}
