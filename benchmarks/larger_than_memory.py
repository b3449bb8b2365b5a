"""A checkpoint of OLMoE-1B-7B's real shape under a memory limit smaller than a third of it.

    python benchmarks/larger_than_memory.py --folder /big/disk --output result.json

Writes 13.8 GB of random bfloat16 weights under the hub's names (one safetensors shard per layer, kept and
reused), then, each in a process of its own inside a memory cgroup of 4 GiB in which the page cache counts
too:

    in place    melinoe generate --model CHECKPOINT: indexed on first use, no second copy
    convert     melinoe convert CHECKPOINT STORE
    store       melinoe generate --model STORE, in turn with in place, and once with a smaller budget

All must generate the same text. For each: seconds, the largest resident set of the process, and the largest
use of the cgroup. Random weights say nothing of quality, nor of the hit rate that a trained model would have.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from common import begin, memory_limit, parser_of, run_json, turns, write_result
from melinoe.config import parse_bytes
from melinoe.demonstration.limited_process import MemoryLimit
from melinoe.demonstration.race import drop_page_cache
from random_olmoe import write_olmoe

PROMPT = " ".join(f"w{100 + 37 * word}" for word in range(16))


def verb(limit: MemoryLimit, name: str, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Runs one verb inside the limit, page cache dropped."""
    drop_page_cache(folder)  # what this process has written would be read without being charged to the limit
    command = [sys.executable, "-m", "melinoe", *arguments, "--json"]
    found = run_json(command, limit, MELINOE_HOME=str(folder / "home"))
    if found is None:
        raise SystemExit(f"{name} was killed: out of memory")
    peak, said = found["peak_cgroup_bytes"], json.dumps(found["output"])
    print(f"{name}: {found['seconds']:.1f} s, cgroup at most {peak} bytes, {said[-420:]}", flush=True)
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="a folder on a disk with 30 GB free")
    parser.add_argument("--layers", type=int, default=16, help="fewer for a quick look")
    parser.add_argument("--limit", default="4GiB", help="of the cgroup")
    parser.add_argument("--memory", default="3GiB", help="melinoe's budget inside it")
    parser.add_argument("--less-memory", default="2GiB", help="of the last run")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2, help="of store and in place in turn")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and store there")
    options = begin(parser)
    folder = options.folder
    source, store = folder / f"olmoe-shape-{options.layers}", folder / f"olmoe-shape-{options.layers}-store"
    began = time.perf_counter()
    total = write_olmoe(source, options.layers)
    print(f"checkpoint: {total} bytes, {time.perf_counter() - began:.0f} s", flush=True)
    for old in (store, folder / "home"):
        shutil.rmtree(old, ignore_errors=True)

    def generate(model: Path, memory: str) -> list[str]:
        fixed = ["-p", PROMPT, "--raw", "--max-new-tokens", str(options.tokens)]
        return ["generate", "--model", str(model), "--memory", memory, *fixed]

    places = {"store": store, "in place": source}
    commands = {"in place, first use": generate(source, options.memory)}
    commands["convert"] = ["convert", str(source), str(store), "--quiet"]
    for number, name in turns(list(places), options.rounds):
        commands[f"{name}, {number + 1}"] = generate(places[name], options.memory)
    commands["store, less memory"] = generate(store, options.less_memory)
    try:
        with memory_limit(parse_bytes(options.limit)) as limit:
            runs = {name: verb(limit, name, folder, command) for name, command in commands.items()}
    finally:
        if not options.keep:
            for made in (source, store, folder / "home"):
                shutil.rmtree(made, ignore_errors=True)
    texts = {run["output"]["text"] for name, run in runs.items() if name != "convert"}
    print(f"all texts equal: {len(texts) == 1}")
    write_result(
        options,
        checkpoint_bytes=total,
        limit_applied=limit.available,
        all_texts_equal=len(texts) == 1,
        runs=runs,
    )


if __name__ == "__main__":
    main()
