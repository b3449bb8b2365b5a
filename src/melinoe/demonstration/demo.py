"""`melinoe demo`: the whole method on one machine in minutes, and one table.

    1 tune, and the control: the same fine-tune without our losses
    2 merge both into plain checkpoints
    3 score quality and record routing on held-out rows
    4 fit the predictor
    5 replay the routing through caches of several sizes
    6 widen the experts to real record sizes and convert
    7 generate with every contestant, each in its own process
Stages 1 to 4 are the verbs that a user would type. The report says how each number came about.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from melinoe._version import __version__
from melinoe.adapters.peft_folder import ADAPTER
from melinoe.config import default_slots, format_bytes
from melinoe.conversion.checkpoint import Checkpoint
from melinoe.data.rows import read_rows
from melinoe.demonstration import arena
from melinoe.demonstration.contestants import contestants
from melinoe.demonstration.race import race
from melinoe.demonstration.replay import PREDICTED, replay
from melinoe.demonstration.report import write_report
from melinoe.demonstration.table import print_table
from melinoe.errors import MelinoeError
from melinoe.files import write_json
from melinoe.models.folder import local_folder, resolve_model
from melinoe.outputs import Kind, Output, json_file
from melinoe.prediction.predictor import PREDICTOR, Predictor
from melinoe.report.page import PAGE
from melinoe.report.setting import commit, data_folder, machine
from melinoe.routing.calls import DECODE
from melinoe.routing.concentration import load_by_rank
from melinoe.routing.policies import Strength
from melinoe.routing.trace import Trace
from melinoe.runtime.load import load_resident
from melinoe.sticky.model import can_be_sticky
from melinoe.verbs import Stages, Verb, run_verbs

FORMAT, VERSION = "melinoe-demo", "1"
WRITES = {
    "tuned": ADAPTER,
    "control": ADAPTER,
    "predictor": PREDICTOR,
    "result.json": json_file("a result of the demo", FORMAT),
    "report.html": PAGE,
}
HELD_OUT_ROWS = 320
STICKY = 0.12  # of the embedded model, docs/log.md
STICKY_ROWS = 64  # of another model's train split, by which its strength is found,
LEAST_STICKY_ROWS = 16  # where the demo is a small one
STICKY_LOSS = "5%"  # that a strength may cost a model that is not tuned for it
TUNING_STEPS = 150
TUNING_SECONDS = 90  # enough for all steps of the embedded model,
OTHERS_SECONDS = 600  # of which a larger one takes a few dozen in this time
DISTILL = 0.8  # on real text this halves the price of locality (docs/results.md)
PREDICTOR_ROWS = 2000
RECORD_BYTES = 3 * 2**20
SCRATCH_FACTOR = 8  # widened experts: three checkpoints, three stores, accelerate's copy, some room


def demo(
    model: str = "tiny",
    data: str | Path | None = None,
    output_dir: str | Path = "demo-output",
    *,
    limit: int | None = None,
    seed: int = 0,
    sticky: float | None = None,
    time_limit: float | None = None,
) -> dict[str, Any]:
    """Runs the method end to end and writes result.json and report.html.

    Args:
        model: checkpoint folder, or `tiny`.
        data: folder of train, valid and test.jsonl; None: the embedded workload (`tiny` only).
        limit: held-out rows to score (default 320). Fewer also tune, fit and generate less.
        seed: of tuning, predictor, prompts and widening.
        sticky: how sticky the model is tuned to be (docs/sticky.md); None: 0.12 for `tiny`, for others what
            costs 5 percent of perplexity on train rows before tuning, at most 0.12; 0 where the routers are
            of a kind that cannot be sticky.
        time_limit: seconds for each of the two tunings; None: 90 for `tiny` (fewer with `limit`), 600 for
            others, which are distilled from themselves as well.

    Returns:
        What result.json holds: {"format", "version", "rows": [...], "teacher_forced": {...}, "settings":
        {...}, ...}.

    Raises:
        MelinoeError: see the verbs; too little disk or something else where the demo would
            write is found before anything starts.
    """
    output, source = Path(output_dir), local_folder(resolve_model(model))
    folder = data_folder(model, data)
    _check_output(output, {"model": source, "data": folder})
    for split in ("train", "test"):
        read_rows(folder, split, limit=1)
    checkpoint = Checkpoint(source)
    shape = checkpoint.shape
    if sticky is None:
        if checkpoint.load_routers() or not can_be_sticky(checkpoint.model):
            sticky = 0.0
        elif model == "tiny":
            sticky = STICKY
    needed = SCRATCH_FACTOR * shape["num_layers"] * shape["num_experts"] * RECORD_BYTES
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        raise MelinoeError(
            f"not enough disk space in {tempfile.gettempdir()}",
            got=f"{format_bytes(free)} free",
            allowed=f"{format_bytes(needed)} or more",
            next_step="set TMPDIR to a folder with room",
        )
    with tempfile.TemporaryDirectory(prefix="melinoe-demo-") as scratch:
        tuning = _tuning(model == "tiny", limit, time_limit)
        run = _Demo(str(source), folder, output, Path(scratch), limit, seed, shape, sticky, tuning)
        result = run.run()
    result["settings"] |= {
        "model": str(model),
        "data": "embedded" if data is None else str(data),
        "limit": limit,
        "time_limit": time_limit,
    }
    write_json(output / "result.json", result, indent=1, default=float)
    write_report(result, output / "report.html")
    print_table(result)
    print(f"report: {output / 'report.html'}   numbers: {output / 'result.json'}")
    return result


def _check_output(output: Path, reads: dict[str, Any]) -> None:
    """The demo writes a few names into its folder; what else stands there is left alone."""
    Output(output, Kind("a folder", True, lambda folder: ""), reads, replace=True).check()
    for name, kind in WRITES.items():
        Output(output / name, kind, reads, replace=True).check()


def _tuning(is_tiny: bool, limit: int | None, time_limit: float | None) -> dict[str, str]:
    """How both models are tuned: what ends it, and on real text with the base as a teacher."""
    part = min(1.0, (limit or HELD_OUT_ROWS) / HELD_OUT_ROWS) if is_tiny else 1.0
    steps = max(10, round(TUNING_STEPS * part))
    seconds = time_limit or (max(10, round(TUNING_SECONDS * part)) if is_tiny else OTHERS_SECONDS)
    distilled = {} if is_tiny else {"--distill": f"{DISTILL:g}"}
    return {"--max-steps": str(steps), "--time-limit": f"{seconds:g}", **distilled}


@dataclass
class _Demo:
    """One run; a method per stage. scratch: a folder for what is gone with the run."""

    source: str
    data: Path
    output: Path
    scratch: Path
    limit: int | None
    seed: int
    shape: dict[str, int]
    sticky: float | None
    tuning: dict[str, str]  # options of both tunings

    def __post_init__(self) -> None:
        self.held_out = self.limit or HELD_OUT_ROWS
        self.part = min(1.0, self.held_out / HELD_OUT_ROWS)  # a smaller demo does less of everything
        self.slots = default_slots(self.shape["num_experts"], self.shape["experts_per_token"])
        self.stages = Stages(7 if self.sticky is not None else 8)
        self.models = {"base": self.source, "control": str(self.scratch / "control")}
        self.models["tuned"] = str(self.scratch / "tuned")

    def run(self) -> dict[str, Any]:
        if self.sticky is None:
            self.sticky = self.find_strength()
        tuning = self.tune()
        self.merge()
        quality, traces = self.score_and_trace()
        predictor = self.fit_predictor()
        forced = self.replay(traces)
        speeds = self.measure_speed()
        rows = [self._row(row, quality, forced) for row in speeds["rows"]]
        return {
            "format": FORMAT,
            "version": VERSION,
            "rows": rows,
            "teacher_forced": forced,
            "quality": quality,
            "predictor": predictor,
            "tuning": tuning,
            "load": {name: _load_by_rank(trace) for name, trace in traces.items()},
            "bandwidth_bytes_per_second": speeds["bandwidth"],
            "record_bytes": speeds["record_bytes"],
            "memory_limit_bytes": speeds["memory_limit_bytes"],
            "answers": speeds["answers"],
            "settings": {
                "model": self.source,
                "data": str(self.data),
                "seed": self.seed,
                "slots": self.slots,
                "held_out_rows": self.held_out,
                "sticky": self.sticky,
                **self.shape,
            },
            "machine": {**machine(), "melinoe": __version__, "commit": commit()},
            "seconds": self.stages.seconds,
        }

    def _run(self, verbs: list[Verb]) -> list[dict[str, Any]]:
        return run_verbs(verbs, self.scratch, stages=self.stages)

    def find_strength(self) -> float:
        self.stages.start("finding how sticky the model can be before it is tuned")
        rows = max(LEAST_STICKY_ROWS, round(STICKY_ROWS * self.part))
        arguments = ["sticky", "--model", self.source, "--data", str(self.data), "--split", "train"]
        arguments += ["--limit", str(rows), "--max-quality-loss", STICKY_LOSS, "--slots", str(self.slots)]
        [found] = self._run([Verb("sticky", arguments)])
        strength = min(STICKY, found["best"] or 0.0)
        self.stages.note(f"--sticky {strength:g}")
        return strength

    def tune(self) -> dict[str, Any]:
        steps, seconds = self.tuning["--max-steps"], self.tuning["--time-limit"]
        self.stages.start(f"tuning, and the control without our losses: {steps} steps or {seconds} s each")
        common = ["--model", self.source, "--data", str(self.data), "--seed", str(self.seed)]
        common += [*chain(*self.tuning.items()), "--slots", str(self.slots)]
        common.append("--overwrite")  # what a demo before has left
        off = ["--lambda-cs", "0", "--lambda-rm", "0", "--sticky", "0"]
        sticky = ["--sticky", f"{self.sticky:g}"]
        control, tuned = self._run(
            [
                Verb("control", ["tune", *common, *off, "--output-dir", str(self.output / "control")]),
                Verb("tuned", ["tune", *common, *sticky, "--output-dir", str(self.output / "tuned")]),
            ]
        )
        curves = {}
        for name in ("control", "tuned"):
            lines = (self.output / name / "losses.jsonl").read_text().splitlines()
            curves[name] = [json.loads(line) for line in lines]
        return {"control": control, "tuned": tuned, "curves": curves}

    def merge(self) -> None:
        self.stages.start("merging both into plain checkpoints")
        common = ["merge", "--model", self.source]
        verbs = [
            Verb(f"merge {name}", [*common, "--adapter", str(self.output / name), "--output-dir", merged])
            for name, merged in self.models.items()
            if name != "base"
        ]
        self._run(verbs)

    def score_and_trace(self) -> tuple[dict[str, dict[str, Any]], dict[str, Trace]]:
        self.stages.start(f"scoring quality and recording routing on {self.held_out} held-out rows")
        data, fitted = ["--data", str(self.data)], round(PREDICTOR_ROWS * self.part)
        held_out = [*data, "--split", "test", "--limit", str(self.held_out)]
        fitting = [*data, "--split", "train", "--limit", str(fitted), "--output", self._trace("fitting")]
        scores, traces = [], []
        for name, folder in self.models.items():
            on_rows = ["--model", folder, *held_out]
            scores.append(Verb(f"evaluate {name}", ["evaluate", *on_rows]))
            traces.append(Verb(f"trace {name}", ["trace", *on_rows, "--output", self._trace(name)]))
        last = Verb("trace for the predictor", ["trace", "--model", self.models["tuned"], *fitting])
        scored = self._run([*scores, *traces, last])
        quality = dict(zip(self.models, scored, strict=False))  # what tracing answers comes behind them
        return quality, {name: Trace.load(self._trace(name)) for name in self.models}

    def _trace(self, name: str) -> str:
        return str(self.scratch / f"{name}.trace")

    @property
    def predictor_path(self) -> str:
        return str(self.output / "predictor")

    def fit_predictor(self) -> dict[str, Any]:
        self.stages.start("fitting the predictor")
        arguments = ["fit-predictor", "--model", self.models["tuned"], "--trace", self._trace("fitting")]
        arguments += ["--output", self.predictor_path, "--seed", str(self.seed)]
        return self._run([Verb("fit predictor", arguments)])[0]

    def replay(self, traces: dict[str, Trace]) -> dict[str, Any]:
        self.stages.start("replaying the recorded routing through caches of several sizes")
        replayed = replay(traces, self.slots, *self._predicted(traces["tuned"]))
        ratio = replayed["pairs"]["tuned / control"]
        self.stages.note(
            f"loads per token, tuned / control: {ratio['ratio']:.3f}"
            f" (95% interval {ratio['low']:.3f} to {ratio['high']:.3f})"
        )
        return replayed

    def _predicted(self, trace: Trace) -> tuple[np.ndarray, list[Strength]]:
        model, _ = load_resident(self.models["tuned"])
        predictor = Predictor.load(self.predictor_path, model)
        return predictor.predict_all(trace.prompts())

    def measure_speed(self) -> dict[str, Any]:
        self.stages.start(f"widening the experts to records of {format_bytes(RECORD_BYTES)} and converting")
        rows = read_rows(self.data, "test", limit=self.held_out)
        random.Random(self.seed).shuffle(rows)
        size = arena.FULL if self.part == 1 else arena.SMALL
        shared = arena.prepare(self.models, self.scratch / "wide", RECORD_BYTES, rows, size, self.seed)
        self.stages.start(
            f"generating: {size.prompts} prompts of {size.new_tokens} tokens, each contestant by itself"
        )
        return race(
            shared, contestants(shared, self.slots, self.predictor_path), self.slots, self.stages.note
        )

    def _row(
        self, row: dict[str, Any], quality: dict[str, dict[str, Any]], forced: dict[str, Any]
    ) -> dict[str, Any]:
        scored = quality[row["weights"]]
        row |= {name: scored.get(name) for name in ("nll", "exact_match", "rouge_l")}
        name = PREDICTED if row["name"] == PREDICTED else row["weights"]
        for one in forced["results"][name]:
            if row["kind"] == "melinoe" and (one["policy"], one["slots"]) == (row["policy"], row["slots"]):
                row["teacher_forced_hit_rate"] = one["hit_rate"]
                row["teacher_forced_loads_per_token"] = one["loads_per_token"]
        return row


def _load_by_rank(trace: Trace) -> list[list[float]]:
    """[L][E], rounded for the file; see `load_by_rank`."""
    shares = load_by_rank(trace.request_counts(DECODE).sum(0))
    return [[round(float(value), 5) for value in layer] for layer in shares]
