"""Tuning with experts in memory against tuning with experts paged: peak memory and seconds per step.

    python benchmarks/paged_tuning.py --model ../shared/models/t0-olmoe --data ../shared/data/t0mix --work /big/disk --output R

Writes an OLMoE of random weights with records of a real size (speed and memory do not depend on what they say; the tokenizer
is the model's) and runs `tune` in a process of its own for every row: resident, and paged with every expert,
half, a quarter and none in slots, the rows taken in turns. The peak is that of a memory cgroup, page cache included;
at the end the quarter runs under a hard limit that the resident run is killed in. All rows have the same data, seed and
steps, and the losses of every row are compared with those of the resident one. `--device cuda` (part of `make gpu`) counts the
card's memory instead, and `--format int4` tunes over a rounded base, resident or paged.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from melinoe.config import format_bytes
from melinoe.conversion.convert import convert
from melinoe.demonstration.limited_process import MemoryLimit
from melinoe.files import whole_folder
from melinoe.models.folder import resolve_model

PROCESS_BYTES = 2**29  # python, torch and transformers, which a budget does not count


def child(task: dict[str, Any]) -> None:
    """One run of `tune`; the last line of stdout is what was measured."""
    import torch

    from melinoe.tuning.trainer import LocalityTrainer
    from melinoe.tuning.tune import plan_memory, tune

    torch.set_num_threads(1)
    starts: list[
        float
    ] = []  # seconds of the processor at the beginning of each step: other jobs do not count
    original = LocalityTrainer.compute_loss

    def timed(self: Any, *arguments: Any, **options: Any) -> Any:
        starts.append(time.process_time())
        return original(self, *arguments, **options)

    LocalityTrainer.compute_loss = timed  # type: ignore[method-assign]
    settings = task["settings"]
    planned = plan_memory(task["model"], task["data"], **settings)  # also imports what is imported late
    if task["dry"]:
        return print(json.dumps(dataclasses.asdict(planned)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = tune(
        task["model"], task["data"], task["output"], memory=task["memory"], progress=False, **settings
    )
    log = [json.loads(line) for line in (Path(task["output"]) / "losses.jsonl").read_text().splitlines()]
    ends = [line["seconds"] for line in log]
    print(
        json.dumps(
            {
                "steps_seconds": [b - a for a, b in itertools.pairwise(ends)],
                "steps_cpu_seconds": [b - a for a, b in itertools.pairwise([*starts, time.process_time()])][
                    1:
                ],
                "losses": [line["total"] for line in log],
                "paged": found.get("paged"),
                "imported_bytes": before,
                "peak_device_bytes": torch.cuda.max_memory_allocated()
                if settings["device"] == "cuda"
                else None,
                "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def run(task: dict[str, Any], limit: MemoryLimit | None) -> dict[str, Any] | None:
    """None: the run was killed."""
    shutil.rmtree(task["output"], ignore_errors=True)
    if limit is not None and limit.available:
        limit.peak_bytes()
    process = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(task)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=limit.join if limit is not None and limit.available else None,
        check=False,
    )
    if process.returncode == -9:
        return None
    if process.returncode:
        raise SystemExit(f"{task['name']} failed with exit code {process.returncode}")
    found = json.loads(process.stdout.strip().splitlines()[-1])
    found["peak_cgroup_bytes"] = limit.peak_bytes() if limit is not None and limit.available else None
    return found


def write_checkpoint(folder: Path, like: str, hidden: int, inner: int, experts: int, layers: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, OlmoeConfig

    source = resolve_model(like)
    base = AutoConfig.from_pretrained(source)
    config = OlmoeConfig(
        vocab_size=base.vocab_size, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, num_experts=experts, num_experts_per_tok=4,
        max_position_embeddings=1024, pad_token_id=base.pad_token_id, eos_token_id=base.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with whole_folder(folder) as new:
        model.save_pretrained(new)
        AutoTokenizer.from_pretrained(source).save_pretrained(new)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="whose tokenizer is used")
    parser.add_argument("--data", default="tiny")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="1024,1024,32,4", help="hidden, inner, experts per layer, layers")
    parser.add_argument("--format", default="auto", help="of the store: auto, int8 or int4")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--work", required=True)
    parser.add_argument("--output")
    options = parser.parse_args()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    os.environ["MELINOE_HOME"] = str(work / "home")
    checkpoint, store = work / f"model-{options.shape}", work / f"store-{options.shape}-{options.format}"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, options.model, *map(int, options.shape.split(",")))
    if not store.exists():
        convert(checkpoint, store, format=options.format, progress=False)
    settings = {
        "max_steps": options.steps, "batch_tokens": options.batch_tokens, "rank": options.rank, "checkpoint_steps": 0,
        "device": options.device,
    }  # fmt: skip
    common = {"data": options.data, "settings": settings, "output": str(work / "adapter"), "dry": False}
    planned = run(
        {
            **common,
            "name": "plan",
            "model": str(store),
            "memory": None,
            "dry": True,
            "output": str(work / "none"),
        },
        None,
    )
    assert planned is not None
    least = sum(planned["paged"].values())
    whole = checkpoint if options.format == "auto" else store
    rows: list[dict[str, Any]] = [{"name": "resident", "model": str(whole), "memory": None}]
    for share, name in ((1.0, "all"), (0.5, "half"), (0.25, "a quarter"), (0.0, "none")):
        slots = int(planned["num_experts"] * share)
        per_slot = planned["packed_slot"] if planned["packed_slot"] and share < 1 else planned["slot"]
        rows.append(
            {"name": f"paged, {name} in slots", "model": str(store), "memory": least + slots * per_slot}
        )
    limit = MemoryLimit(64 * 2**30)
    results: dict[str, Any] = {"settings": vars(options), "planned": planned, "rows": {}}
    try:
        for _ in range(options.repeats):
            for row in rows:
                found = run({**common, **row}, limit)
                assert found is not None, row["name"]
                found["budget"] = row["memory"]
                results["rows"].setdefault(row["name"], []).append(found)
                print(row["name"], json.dumps(found), flush=True)
    finally:
        limit.close()
    expected = results["rows"]["resident"][0]["losses"]
    for name, runs in results["rows"].items():
        differ = max(
            abs(a - b) / abs(b) for one in runs for a, b in zip(one["losses"], expected, strict=True)
        )
        results["rows"][name] = {"runs": runs, "largest_relative_loss_difference": differ}
    quarter = rows[3]
    tight = MemoryLimit(quarter["memory"] + PROCESS_BYTES)
    if tight.available and options.device == "cpu":
        try:
            results["limited"] = {
                "limit_bytes": tight.limit_bytes,
                "paged": run({**common, **quarter}, tight),
                "resident_was_killed": run({**common, **rows[0]}, tight) is None,
            }
        finally:
            tight.close()
    print(table(results))
    if options.output:
        Path(options.output).write_text(json.dumps(results, indent=1))


def table(results: dict[str, Any]) -> str:
    lines = [
        "| row | planned | peak, cgroup | peak, process over its imports (or the card) | CPU s/step | of resident | wall s/step | read per step | loss differs by |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    base = None
    for name, row in results["rows"].items():
        runs = row["runs"]
        seconds = [value for one in runs for value in one["steps_seconds"]]
        cpu = [value for one in runs for value in one["steps_cpu_seconds"]]
        middle = statistics.median(cpu)
        base = base or middle
        read = runs[0]["paged"]["bytes_read"] / results["settings"]["steps"] if runs[0]["paged"] else 0
        planned = runs[0]["budget"] or sum(results["planned"]["resident"].values())
        own = max(
            one["peak_device_bytes"] or one["peak_resident_bytes"] - one["imported_bytes"] for one in runs
        )
        cgroup = max(one["peak_cgroup_bytes"] or 0 for one in runs)
        lines.append(
            f"| {name} | {format_bytes(planned)} | {format_bytes(cgroup) if cgroup else '-'} | {format_bytes(own)} |"
            f" {middle:.2f} ({min(cpu):.2f} to {max(cpu):.2f}) | {middle / base:.2f} |"
            f" {statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) | {format_bytes(read)} |"
            f" {row['largest_relative_loss_difference']:.1g} |"
        )
    if "limited" in results:
        found = results["limited"]
        lines.append(
            f"\nUnder a limit of {format_bytes(found['limit_bytes'])}: the resident run was"
            f" {'killed' if found['resident_was_killed'] else 'not killed'}, the paged one"
            f" {'finished' if found['paged'] else 'was killed'}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
