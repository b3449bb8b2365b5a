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

import importlib.util
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.config import default_slots, format_bytes
from melinoe.conversion.checkpoint import Checkpoint
from melinoe.data.rows import read_rows
from melinoe.demonstration import contestants as speed
from melinoe.demonstration.report import write_report
from melinoe.demonstration.table import print_table
from melinoe.errors import MelinoeError, missing_extra
from melinoe.files import write_json
from melinoe.models.folder import local_folder, resolve_model
from melinoe.prediction.fit import Predictor
from melinoe.report.setting import data_folder, machine
from melinoe.routing.policies import Strength
from melinoe.routing.simulate import paired_difference, simulate
from melinoe.routing.trace import Trace
from melinoe.runtime.load import load_resident
from melinoe.verbs import Stages, Verb, run_verbs

HELD_OUT_ROWS = 320
TUNING_STEPS = 150
TUNING_SECONDS = 90
PREDICTOR_ROWS = 2000
RECORD_BYTES = 3 * 2**20
SCRATCH_FACTOR = 8  # widened experts: three checkpoints, three stores, accelerate's copy, some room
WEIGHTS = ("base", "control", "tuned")


def demo(
    model: str = "tiny",
    data: str | Path | None = None,
    output_dir: str | Path = "demo-output",
    *,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Runs the method end to end and writes result.json and report.html.

    Args:
        model: checkpoint folder, or `tiny`.
        data: folder of train, valid and test.jsonl; None: the embedded workload (`tiny` only).
        limit: held-out rows to score (default 320). Fewer also tune, fit and generate less.
        seed: of tuning, predictor, prompts and widening.

    Returns:
        What result.json holds: {"rows": [...], "teacher_forced": {...}, "settings": {...}, ...}.

    Raises:
        MelinoeError: see the verbs; a missing extra or too little disk is found before anything starts.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "report")
    output, source = Path(output_dir), local_folder(resolve_model(model))
    folder = data_folder(model, data)
    for split in ("train", "test"):
        read_rows(folder, split, limit=1)
    shape = Checkpoint(source).shape
    needed = SCRATCH_FACTOR * shape["num_layers"] * shape["num_experts"] * RECORD_BYTES
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        raise MelinoeError(
            f"not enough disk space in {tempfile.gettempdir()}",
            got=f"{format_bytes(free)} free",
            allowed=f"{format_bytes(needed)} or more",
            next_step="set TMPDIR to a folder with room",
        )
    output.mkdir(parents=True, exist_ok=True)
    for leftover in ("tuned", "control"):
        shutil.rmtree(output / leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="melinoe-demo-") as scratch:
        run = _Demo(str(source), folder, output, Path(scratch), limit, seed, shape)
        result = run.run()
    write_json(output / "result.json", result, indent=1, default=float)
    write_report(result, output / "report.html")
    print_table(result)
    print(f"report: {output / 'report.html'}   numbers: {output / 'result.json'}")
    return result


class _Demo:
    """One run; a method per stage."""

    def __init__(
        self,
        source: str,
        data: Path,
        output: Path,
        scratch: Path,
        limit: int | None,
        seed: int,
        shape: dict[str, int],
    ) -> None:
        self.source, self.data, self.output, self.scratch = source, data, output, scratch
        self.held_out = limit or HELD_OUT_ROWS
        self.part = min(1.0, self.held_out / HELD_OUT_ROWS)  # a smaller demo does less of everything
        self.seed, self.shape = seed, shape
        self.slots = default_slots(shape["num_experts"], shape["experts_per_token"])
        self.stages = Stages(7)
        self.models = {"base": source, "control": str(scratch / "control"), "tuned": str(scratch / "tuned")}

    def run(self) -> dict[str, Any]:
        tuning = self.tune()
        self.merge()
        quality, traces = self.score_and_trace()
        predictor = self.fit_predictor()
        forced = self.replay(traces)
        speeds = self.measure_speed()
        rows = [self._row(row, quality, forced) for row in speeds["rows"]]
        return {
            "rows": rows,
            "teacher_forced": forced,
            "quality": quality,
            "predictor": predictor,
            "tuning": tuning,
            "load": {name: _load_over_experts(trace) for name, trace in traces.items()},
            "bandwidth_bytes_per_second": speeds["bandwidth"],
            "record_bytes": speeds["record_bytes"],
            "memory_limit_bytes": speeds["memory_limit_bytes"],
            "settings": {
                "model": self.source,
                "data": str(self.data),
                "seed": self.seed,
                "slots": self.slots,
                "held_out_rows": self.held_out,
                **self.shape,
            },
            "machine": machine(),
            "seconds": self.stages.seconds,
        }

    def tune(self) -> dict[str, Any]:
        steps, seconds = max(10, round(TUNING_STEPS * self.part)), max(10, round(TUNING_SECONDS * self.part))
        self.stages.start(f"tuning, and the control without our losses: {steps} steps or {seconds} s each")
        common = ["--model", self.source, "--data", str(self.data), "--seed", str(self.seed)]
        common += ["--max-steps", str(steps), "--time-limit", str(seconds), "--slots", str(self.slots)]
        off = ["--lambda-cs", "0", "--lambda-rm", "0"]
        control, tuned = run_verbs(
            [
                Verb("control", ["tune", *common, *off, "--output-dir", str(self.output / "control")]),
                Verb("tuned", ["tune", *common, "--output-dir", str(self.output / "tuned")]),
            ],
            self.scratch,
        )
        curves = {}
        for name in ("control", "tuned"):
            lines = (self.output / name / "losses.jsonl").read_text().splitlines()
            curves[name] = [json.loads(line) for line in lines]
        return {"control": control, "tuned": tuned, "curves": curves}

    def merge(self) -> None:
        self.stages.start("merging both into plain checkpoints")
        run_verbs(
            [
                Verb(
                    f"merge {name}",
                    [
                        "merge",
                        "--model",
                        self.source,
                        "--adapter",
                        str(self.output / name),
                        "--output-dir",
                        self.models[name],
                    ],
                )
                for name in ("control", "tuned")
            ],
            self.scratch,
        )

    def score_and_trace(self) -> tuple[dict[str, dict[str, Any]], dict[str, Trace]]:
        self.stages.start(f"scoring quality and recording routing on {self.held_out} held-out rows")
        held_out = ["--data", str(self.data), "--split", "test", "--limit", str(self.held_out)]
        fitting = [
            "--data",
            str(self.data),
            "--split",
            "train",
            "--limit",
            str(round(PREDICTOR_ROWS * self.part)),
        ]
        verbs = [
            Verb(f"evaluate {name}", ["evaluate", "--model", self.models[name], *held_out])
            for name in WEIGHTS
        ]
        verbs += [
            Verb(
                f"trace {name}",
                ["trace", "--model", self.models[name], *held_out, "--output", self._trace(name)],
            )
            for name in WEIGHTS
        ]
        verbs.append(
            Verb(
                "trace for the predictor",
                ["trace", "--model", self.models["tuned"], *fitting, "--output", self._trace("fitting")],
            )
        )
        scored = run_verbs(verbs, self.scratch)[: len(WEIGHTS)]
        traces = {name: Trace.load(self._trace(name)) for name in WEIGHTS}
        return dict(zip(WEIGHTS, scored, strict=True)), traces

    def _trace(self, name: str) -> str:
        return str(self.scratch / f"{name}.trace")

    @property
    def predictor_path(self) -> str:
        return str(self.output / "predictor")

    def fit_predictor(self) -> dict[str, Any]:
        self.stages.start("fitting the predictor")
        arguments = ["fit-predictor", "--model", self.models["tuned"], "--trace", self._trace("fitting")]
        arguments += ["--output", self.predictor_path, "--seed", str(self.seed)]
        return run_verbs([Verb("fit predictor", arguments)], self.scratch)[0]

    def replay(self, traces: dict[str, Trace]) -> dict[str, Any]:
        """Teacher-forced: the same references for all weights, so that loads can be compared in pairs."""
        self.stages.start("replaying the recorded routing through caches of several sizes")
        experts = self.shape["num_experts"]
        sizes = sorted({max(1, experts // 8), self.slots, 3 * experts // 8, experts // 2, 3 * experts // 4})
        results: dict[str, Any] = {}
        for name, trace in traces.items():
            if name == "tuned":
                scores, strength = self._predicted(trace)
                predicted = simulate(
                    trace, "decay", self.slots, predictor_scores=scores, strength=strength, per_sequence=True
                )
                results["tuned + predictor"] = predicted["results"]
            results[name] = simulate(trace, "decay,lru,belady", self.slots, per_sequence=True)["results"]
            others = [size for size in sizes if size != self.slots]
            results[name] += simulate(trace, "decay,lru", others)["results"]
        pairs = {
            f"{a} / {b}": paired_difference(results[a][0], results[b][0])
            for a, b in (
                ("tuned", "control"),
                ("tuned", "base"),
                ("control", "base"),
                ("tuned + predictor", "tuned"),
            )
        }
        for rows in results.values():
            for row in rows:
                row.pop("per_sequence", None)
        ratio = pairs["tuned / control"]
        self.stages.note(
            f"loads per token, tuned / control: {ratio['ratio']:.3f}"
            f" (95% interval {ratio['low']:.3f} to {ratio['high']:.3f})"
        )
        return {"results": results, "pairs": pairs}

    def _predicted(self, trace: Trace) -> tuple[np.ndarray, Strength]:
        model, _ = load_resident(self.models["tuned"])
        predictor = Predictor.load(self.predictor_path, model)
        return np.stack([predictor.scores(prompt) for prompt in trace.prompts()]), predictor.strength

    def measure_speed(self) -> dict[str, Any]:
        self.stages.start(f"widening the experts to records of {format_bytes(RECORD_BYTES)} and converting")
        rows = read_rows(self.data, "test", limit=self.held_out)
        random.Random(self.seed).shuffle(rows)
        size = speed.FULL if self.part == 1 else speed.SMALL
        arena = speed.prepare(self.models, self.scratch / "wide", RECORD_BYTES, rows, size, self.seed)
        self.stages.start(
            f"generating: {size.prompts} prompts of {size.new_tokens} tokens, each contestant by itself"
        )
        contestants = speed.contestants(arena, self.slots, self.predictor_path)
        return speed.run(arena, contestants, self.slots, self.stages.note)

    def _row(
        self, row: dict[str, Any], quality: dict[str, dict[str, Any]], forced: dict[str, Any]
    ) -> dict[str, Any]:
        scored = quality[row["weights"]]
        row |= {name: scored.get(name) for name in ("nll", "exact_match", "rouge_l")}
        name = "tuned + predictor" if row["name"] == "tuned + predictor" else row["weights"]
        for one in forced["results"][name]:
            if row["kind"] == "melinoe" and (one["policy"], one["slots"]) == (row["policy"], row["slots"]):
                row["teacher_forced_hit_rate"] = one["hit_rate"]
                row["teacher_forced_loads_per_token"] = one["loads_per_token"]
        return row


def _load_over_experts(trace: Trace) -> list[list[float]]:
    """[L][E] share of the decode requests of each layer that went to each expert, largest first."""
    counts = trace.request_counts("decode").sum(0)
    shares = np.sort(counts / counts.sum(1, keepdims=True), axis=1)[:, ::-1]
    return [[round(float(value), 5) for value in layer] for layer in shares]
