"""Tuning with experts in memory against tuning with experts paged: peak memory and seconds per step.

    python benchmarks/paged_tuning.py --model ../shared/models/t0-olmoe --data ../shared/data/t0mix \\
        --work /big/disk --output result.json

Writes an OLMoE of random weights with records of a real size (speed and memory do not depend on what they
say; the tokenizer is the model's) and runs `tune` in a process of its own for every row: resident, and paged
with every expert, half, a quarter and none in slots, the rows taking turns. The peak is that of a memory
cgroup, page cache included; at the end the quarter runs under a hard limit that the resident run is killed
in. All rows have the same data, seed and steps, and the losses of every row are compared with those of the
resident one. `--device cuda` (part of `make gpu`) counts the card's memory instead, and `--format int4` tunes
over a rounded base, resident or paged.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from common import begin, memory_limit, parser_of, run_json, turns, write_result, written
from melinoe.config import format_bytes
from melinoe.conversion.convert import convert
from melinoe.demonstration.limited_process import MemoryLimit
from melinoe.files import whole_folder
from melinoe.models.folder import resolve_model
from random_olmoe import small_config

PROCESS_BYTES = 2**29  # python, torch and transformers, which a budget does not count


def child(task: dict[str, Any]) -> None:
    """One run of `tune`; the last line of stdout is what was measured."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from melinoe.tuning.tune import plan_memory, tune

    torch.set_num_threads(1)
    settings = task["settings"]
    planned = plan_memory(task["model"], task["data"], **settings)  # also imports what is imported late
    if task["dry"]:
        return print(json.dumps(dataclasses.asdict(planned)))
    ends: list[float] = []  # seconds of the processor at the end of each step: other jobs do not count
    register_optimizer_step_post_hook(lambda *_: ends.append(time.process_time()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = tune(
        task["model"], task["data"], task["output"], memory=task["memory"], progress=False, **settings
    )
    log = [json.loads(line) for line in (Path(task["output"]) / "losses.jsonl").read_text().splitlines()]
    on_cuda = settings["device"] == "cuda"
    measured = {
        "steps_seconds": [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(log)],
        "steps_cpu_seconds": [b - a for a, b in itertools.pairwise(ends)],
        "losses": [line["total"] for line in log],
        "paged": found.get("paged"),
        "imported_bytes": before,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if on_cuda else None,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(measured))


def run(task: dict[str, Any], limit: MemoryLimit | None = None) -> dict[str, Any] | None:
    """What one run measured; None: it was killed."""
    shutil.rmtree(task["output"], ignore_errors=True)
    found = run_json([sys.executable, __file__, "--child", json.dumps(task)], limit)
    return found and found["output"] | {"peak_cgroup_bytes": found["peak_cgroup_bytes"]}


def write_checkpoint(folder: Path, like: str, hidden: int, inner: int, experts: int, layers: int) -> None:
    """A model of this shape with the tokenizer of `like`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = resolve_model(like)
    base = AutoConfig.from_pretrained(source)
    torch.manual_seed(0)
    config = small_config(
        hidden,
        inner,
        experts,
        layers,
        top_k=4,
        vocab_size=base.vocab_size,
        max_position_embeddings=1024,
        pad_token_id=base.pad_token_id,
        eos_token_id=base.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with whole_folder(folder) as new:
        model.save_pretrained(new)
        AutoTokenizer.from_pretrained(source).save_pretrained(new)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(json.loads(sys.argv[2]))
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="tiny", help="whose tokenizer is used")
    parser.add_argument("--data", default="tiny")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="1024,1024,32,4", help="hidden, inner, experts per layer, layers")
    parser.add_argument("--format", default="auto", help="of the store: auto, int8 or int4")
    parser.add_argument("--steps", type=int, default=3, help="at least 2: the first one warms up")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a step, each of --batch-tokens")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True, help="a folder for models, which stay there")
    options = begin(parser)
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    os.environ["MELINOE_HOME"] = str(work / "home")
    checkpoint, store = work / f"model-{options.shape}", work / f"store-{options.shape}-{options.format}"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, options.model, *map(int, options.shape.split(",")))
    if not store.exists():
        convert(checkpoint, store, format=options.format, progress=False)
    settings = {
        "max_steps": options.steps,
        "batch_tokens": options.batch_tokens,
        "accumulate": options.accumulate,
        "rank": options.rank,
        "checkpoint_steps": 0,
        "device": options.device,
    }
    common = {"data": options.data, "settings": settings, "output": str(work / "adapter"), "dry": False}
    planned = run({**common, "model": str(store), "memory": None, "dry": True})
    assert planned is not None
    rows = contestants(planned, str(checkpoint if options.format == "auto" else store), str(store))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    with memory_limit(64 * 2**30) as limit:
        for _, name in turns(list(rows), options.repeats):
            one = run({**common, **rows[name]}, limit)
            assert one is not None, name
            found[name].append(one | {"budget": rows[name]["memory"]})
            print(name, json.dumps(found[name][-1]), flush=True)
    expected = found["resident"][0]["losses"]
    differences = {
        name: max(abs(a - b) / abs(b) for one in runs for a, b in zip(one["losses"], expected, strict=True))
        for name, runs in found.items()
    }
    limited: dict[str, Any] | None = None
    if limit.available and options.device == "cpu":
        quarter = rows["paged, a quarter in slots"]
        with memory_limit(quarter["memory"] + PROCESS_BYTES) as tight:
            limited = {
                "limit_bytes": tight.limit_bytes,
                "paged": run({**common, **quarter}, tight),
                "resident_was_killed": run({**common, **rows["resident"]}, tight) is None,
            }
    shutil.rmtree(work / "adapter", ignore_errors=True)
    print(table(found, differences, planned, options.steps))
    if limited is not None:
        print(
            f"\nUnder a limit of {format_bytes(limited['limit_bytes'])}: the resident run was"
            f" {'killed' if limited['resident_was_killed'] else 'not killed'}, the paged one"
            f" {'finished' if limited['paged'] else 'was killed'}."
        )
    write_result(
        options, planned=planned, rows=found, largest_relative_loss_difference=differences, limited=limited
    )


def contestants(planned: dict[str, Any], whole: str, store: str) -> dict[str, dict[str, Any]]:
    """The rows: everything in memory, and budgets for all, half, a quarter and none of the experts."""
    rows: dict[str, dict[str, Any]] = {"resident": {"model": whole, "memory": None}}
    least = sum(planned["paged"].values())
    for share, name in ((1.0, "all"), (0.5, "half"), (0.25, "a quarter"), (0.0, "none")):
        slots = int(planned["num_experts"] * share)
        per_slot = planned["packed_slot"] if planned["packed_slot"] and share < 1 else planned["slot"]
        rows[f"paged, {name} in slots"] = {"model": store, "memory": least + slots * per_slot}
    return rows


def table(
    found: dict[str, list[dict[str, Any]]], differences: dict[str, float], planned: dict[str, Any], steps: int
) -> str:
    """The rows in Markdown, as in docs/results.md."""
    names = ["planned", "peak, cgroup", "peak, process over its imports (or the card)", "CPU s/step"]
    names += ["of resident", "wall s/step", "parts", "read per step", "loss differs by"]
    lines = ["| row | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    base = None
    for name, runs in found.items():
        seconds = [value for one in runs for value in one["steps_seconds"]]
        cpu = [value for one in runs for value in one["steps_cpu_seconds"]]
        middle = statistics.median(cpu)
        base = base or middle
        read = runs[0]["paged"]["bytes_read"] / steps if runs[0]["paged"] else 0
        budget = runs[0]["budget"] or sum(planned["resident"].values())
        own = max(
            one["peak_device_bytes"] or one["peak_resident_bytes"] - one["imported_bytes"] for one in runs
        )
        cgroup = max(one["peak_cgroup_bytes"] or 0 for one in runs)
        cells = (
            name,
            format_bytes(budget),
            format_bytes(cgroup) if cgroup else "-",
            format_bytes(own),
            written(cpu),
            f"{middle / base:.2f}",
            written(seconds, 1),
            str(runs[0]["paged"]["parts"]) if runs[0]["paged"] else "-",
            format_bytes(read),
            f"{differences[name]:.1g}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
