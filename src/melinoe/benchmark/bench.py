"""`melinoe bench`: every way to run a model under one memory limit, in one table.

    1 what the rows read: widened weights, stores, GGUF files
    2 quality of every precision of every weights
    3 the published policies that our pager does not have, in the simulator
    4 repeats: all rows take turns, each in a process of its own under the same limit, page cache included

Every repeat of every row is a file in OUTPUT/runs, so that an interrupted bench goes on. result.json has the
table, the settings, the machine, the versions and the commit.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from melinoe._version import __version__
from melinoe.benchmark.entries import BASE, CONTROL, OURS, TUNED, Entry, chosen, entries
from melinoe.benchmark.folder import FORMAT, VERSION, begin, slug
from melinoe.benchmark.page import write_bench_page
from melinoe.benchmark.predicted import INTERPRETER_BYTES, budget_of, prediction_of
from melinoe.benchmark.prepare import Arena, prepare, prompts_of
from melinoe.benchmark.quality import key_of, quality
from melinoe.benchmark.simulated import routing
from melinoe.benchmark.summary import SPEED, rank, summarise
from melinoe.benchmark.turns import Runs, Size, Turns, agreement
from melinoe.config import default_slots, parse_bytes
from melinoe.conversion.checkpoint import Checkpoint
from melinoe.data.rows import Row, read_rows
from melinoe.demonstration.limited_process import MemoryLimit
from melinoe.files import write_json
from melinoe.models.folder import local_folder, resolve_model
from melinoe.report.setting import commit, data_folder, machine
from melinoe.runtime.load import load_tokenizer
from melinoe.runtime.plan import plan
from melinoe.verbs import Stages

RECORD_BYTES = 3 * 2**20
RANDOM = "random"  # in place of data: prompts of random tokens, for weights that were never trained


def bench(
    model: str | Path = "tiny",
    memory: int | str | None = None,
    data: str | Path | None = None,
    output_dir: str | Path = "bench-output",
    *,
    tuned: str | Path | None = None,
    control: str | Path | None = None,
    predictor: str | Path | None = None,
    rows: list[str] | None = None,
    record_bytes: int = RECORD_BYTES,
    repeats: int = 5,
    prompts: int = 2,
    new_tokens: int = 32,
    seconds: float = 12.0,
    quality_rows: int = 48,
    threads: int = 1,
    seed: int = 0,
    keep: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures every way to run a model under one memory limit, and writes the table.

    Args:
        model: checkpoint folder, Hub id, or `tiny`.
        memory: of every process, page cache included (a cgroup), the interpreter and its libraries too; ours
            take what these leave. None: what the interpreter needs, two layers of experts and some room.
        data: folder with test.jsonl; None: the embedded workload (`tiny` only); `random`: random prompts, and
            nothing about quality.
        output_dir: result.json, bench.html, and what an interrupted bench goes on with.
        tuned, control: adapters that `melinoe tune` wrote, or merged checkpoints.
        predictor: of the tuned weights; of the base where there are none.
        rows: names of rows to run; None: all.
        record_bytes: smaller experts are widened to it, function-preserving; 0: never.
        repeats: processes of every row. prompts, new_tokens: of each. seconds: after which a request is cut.
        quality_rows: held-out rows for NLL and Rouge-L, and for the simulator; 0: neither.
        threads: of every process.
        seed: of the prompts and of the widening.
        keep: leave the prepared weights in the output folder.
        overwrite: begin anew in a folder that has a bench of other settings.

    Returns:
        What result.json holds: {"format", "version", "rows": [...], "simulated": [...], "skipped": {row:
        why}, "settings", "machine", ...}.

    Raises:
        MelinoeError: no such model, data or row; settings or weights other than those of the bench that is
            there.
    """
    size = Size(repeats, prompts, new_tokens, seconds, quality_rows)
    limit_bytes = None if memory is None else parse_bytes(memory)
    output, source = Path(output_dir), local_folder(resolve_model(model))
    models: dict[str, str | Path] = {BASE: source}
    models |= {name: path for name, path in ((CONTROL, control), (TUNED, tuned)) if path is not None}
    wanted = chosen(entries(list(models), predictor is not None), rows)
    held_out: list[Row] | None = None
    folder = None
    if str(data) != RANDOM:
        folder = data_folder(str(model), data)
        held_out = read_rows(folder, "test")
        random.Random(seed).shuffle(held_out)  # files go by task
    reads = {"model": source, "data": folder, "tuned": tuned, "control": control, "predictor": predictor}
    settings = {
        "model": str(model),
        "memory": memory,
        "data": None if data is None else str(data),
        "tuned": None if tuned is None else str(tuned),
        "control": None if control is None else str(control),
        "predictor": None if predictor is None else str(predictor),
        "record_bytes": record_bytes,
        "prompts": prompts,
        "new_tokens": new_tokens,
        "seconds": seconds,
        "quality_rows": quality_rows,
        "threads": threads,
        "seed": seed,
    }
    begin(output, reads, settings, overwrite)
    run = _Bench(output, settings, models, wanted, size, held_out, Stages(4, progress))
    result = run.run(None if predictor is None else str(predictor), limit_bytes, record_bytes)
    result["settings"]["rows"] = rows
    write_json(output / "result.json", result, indent=1, default=float)
    write_bench_page(result, output / "bench.html")
    if not keep:
        shutil.rmtree(output / "work", ignore_errors=True)
    return result


class _Bench:
    """One bench; a method for each stage."""

    def __init__(
        self,
        output: Path,
        settings: dict[str, Any],
        models: dict[str, str | Path],
        wanted: list[Entry],
        size: Size,
        held_out: list[Row] | None,
        stages: Stages,
    ) -> None:
        self.output, self.settings, self.models, self.wanted = output, settings, models, wanted
        self.size, self.held_out, self.stages = size, held_out, stages
        self.seed, self.threads = settings["seed"], settings["threads"]
        self.answers: dict[str, str] = {}
        self.timeline: dict[str, Any] = {}
        self.budget: dict[str, Any] = {}

    def run(self, predictor: str | None, given_bytes: int | None, record_bytes: int) -> dict[str, Any]:
        self.stages.start("preparing weights, stores and files")
        arena = prepare(
            self.models, self.wanted, self.output / "work", record_bytes, self.seed, self.stages.note
        )
        rows = [row for row in self.wanted if row.name not in arena.skipped]
        for name, reason in arena.skipped.items():
            self.stages.note(f"skipped: {name}: {reason}")
        shape = Checkpoint(arena.checkpoints[BASE]).shape
        limit_bytes = self._limit_bytes(arena, shape) if given_bytes is None else given_bytes
        prompts = prompts_of(self.held_out, arena.checkpoints[BASE], self.size.prompts, self.seed)
        self.stages.start("quality of every precision")
        known = self._quality(arena, rows, prompts[0])
        self.stages.start("published policies in the simulator")
        slots = self._slots(arena, limit_bytes)
        routed = self._routing(arena, slots)
        self.stages.start(f"{len(rows)} rows, {self.size.repeats} times in turn")
        limit = MemoryLimit(limit_bytes)
        if not limit.available:
            self.stages.note("no memory cgroup can be made here: nothing is limited")
        try:
            table = self._race(arena, rows, limit, prompts, predictor)
        finally:
            limit.close()
        for row in table:
            row |= known.get(row.pop("quality_key"), {})
        return {
            "format": FORMAT,
            "version": VERSION,
            "rows": table,
            "simulated": routed.get(BASE, {}).get("rows", []),
            "routing": {name: {**one, "rows": None} for name, one in routed.items()},
            "answers": self.answers,
            "prompt": load_tokenizer(arena.checkpoints[BASE]).decode(prompts[0], skip_special_tokens=True),
            "timeline": self.timeline,
            "budget": self.budget,
            "skipped": arena.skipped,
            "memory_limit_bytes": limit_bytes if limit.available else None,
            "record_bytes": arena.store.max_record_bytes,
            "expert_bytes": arena.store.expert_bytes,
            "prompt_tokens": [len(prompt) for prompt in prompts],
            "settings": {**self.settings, **shape, "repeats": self.size.repeats},
            "machine": {**machine(), "melinoe": __version__, "commit": commit()},
            "seconds": self.stages.seconds,
        }

    def _limit_bytes(self, arena: Arena, shape: dict[str, int]) -> int:
        store = arena.store
        slots = default_slots(shape["num_experts"], shape["experts_per_token"])
        needed = plan(store.folder, slots=slots, measure_seconds=0)["budget"]["total_bytes"]
        layer = max(layer.num_experts * layer.layout.record_bytes for layer in store.layers)
        return INTERPRETER_BYTES + int(needed) + layer

    def _slots(self, arena: Arena, limit_bytes: int) -> int:
        found = plan(arena.store.folder, budget_of(limit_bytes), measure_seconds=0)
        return int(found["budget"]["slots"])

    def _quality(self, arena: Arena, rows: list[Entry], prompt: list[int]) -> dict[str, dict[str, Any]]:
        if self.held_out is None or not self.size.quality_rows:
            return {}
        known = {}
        for row in rows:
            key = key_of(row)
            file = self.output / "quality" / f"{slug(key)}.json"
            if key in known:
                continue
            if not file.is_file():
                write_json(file, quality(arena, row, self.held_out[: self.size.quality_rows], prompt))
            known[key] = json.loads(file.read_text())
            answer = known[key].pop("answer", "")
            if answer and key == f"{row.weights} auto":
                self.answers[row.weights] = answer
            self.stages.note(f"{key}: NLL {known[key]['nll']:.4f}, Rouge-L {known[key]['rouge_l']:.3f}")
        return known

    def _routing(self, arena: Arena, slots: int) -> dict[str, Any]:
        if self.held_out is None or not self.size.quality_rows:
            return {}
        file = self.output / "routing.json"
        if not file.is_file():
            write_json(
                file, routing(arena.plain, self.held_out, self.size.quality_rows, slots), default=float
            )
        return json.loads(file.read_text())

    def _race(
        self,
        arena: Arena,
        rows: list[Entry],
        limit: MemoryLimit,
        prompts: list[list[int]],
        predictor: str | None,
    ) -> list[dict[str, Any]]:
        turns = Turns(
            arena, self.output, limit, prompts, predictor, self.size, self.threads, self.stages.note
        )
        runs, predicted = turns.run(rows)
        rows = [row for row in rows if row.name in runs]
        table = []
        for row in rows:
            found = {**row.to_json(), "limited": row.limited and limit.available}
            found |= summarise(runs[row.name]) | {"quality_key": key_of(row)}
            found |= agreement(row, runs, rows)
            table.append(found | prediction_of(found, predicted))
        rank(table)
        self._show(arena, table, runs)
        return table

    def _show(self, arena: Arena, table: list[dict[str, Any]], runs: Runs) -> None:
        """What the page shows of single runs: an answer of all weights, one generation, its memory."""
        own = [row for row in table if row["kind"] == OURS and row["slots"]]
        tokenizer = load_tokenizer(arena.checkpoints[BASE])
        for row in own:
            if row["precision"] == "auto" and row["weights"] not in self.answers:
                first = runs[row["name"]][0]["requests"][0]["tokens"]  # nobody measured its quality
                self.answers[row["weights"]] = tokenizer.decode(first, skip_special_tokens=True)
        if own:
            best = max(own, key=lambda row: row[SPEED])
            run = runs[best["name"]][0]
            names = ("times", "waits", "reads")
            self.timeline = {name: run["requests"][0][name] for name in names} | {"name": best["name"]}
            self.budget = {"name": best["name"], **run["budget"]}
