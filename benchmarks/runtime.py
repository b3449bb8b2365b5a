"""How close the runtime comes to its ceilings, and how far ahead of its peer: three ratios, one run.

    python benchmarks/runtime.py --model tiny --output result.json      (make bench)

    misses   bytes over the time in which a read is outstanding, over what a bare reader reaches with the same
             record size, threads and misses per layer                                          aim >= 0.85
    hits     decoding with every expert in slots, over the resident model with grouped_mm       aim >= 1
    peer     decoding at a quarter of the experts, over accelerate's disk_offload of the
             experts: same widened model, same memory limit                                     aim >= 10

Every contestant runs in its own process, in turn, `--rounds` times; a ratio is taken within a round, and the
table gives the median and the range over rounds. Tokens are compared with the resident model's every time.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np

from melinoe.bench import speed
from melinoe.bench.measure import Contestant
from melinoe.config import resolve_model
from melinoe.data import read_rows
from melinoe.offload.planning import record_bandwidth
from melinoe.offload.store import open_store

RECORD_BYTES = 3 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", help="folder with test.jsonl; the embedded workload if not given")
    parser.add_argument("--record-bytes", type=int, default=RECORD_BYTES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--output")
    options = parser.parse_args()
    data = options.data
    if data is None:
        from melinoe.tiny import data_path

        data = data_path()
    rows = read_rows(data, "test", limit=200)
    random.Random(0).shuffle(rows)
    size = speed.Size(options.prompts, options.tokens, 1, 6)
    folder = Path(tempfile.mkdtemp(prefix="melinoe-bench-"))
    try:
        source = str(resolve_model(options.model))
        arena = speed.prepare({"base": source}, folder / "wide", options.record_bytes, rows, size, 0)
        rounds = [one_round(arena) for _ in range(options.rounds)]
    finally:
        shutil.rmtree(folder)
    result = {"settings": vars(options), "rounds": rounds, "ratios": {}}
    print(f"{'ratio':<8}{'median':>9}{'lowest':>9}{'highest':>9}")
    for name in ("misses", "hits", "peer"):
        values = [one["ratios"][name] for one in rounds]
        summary = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
        result["ratios"][name] = summary
        print(f"{name:<8}" + "".join(f"{value:>9.3f}" for value in summary.values()))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1, default=float))


def one_round(arena: speed.Arena) -> dict:
    """One measurement of every contestant, and the ratios between them."""
    store = open_store(arena.stores["base"])
    experts = max(layer.num_experts for layer in store.layers)
    quarter_slots = max(1, experts // 4)
    model, stored = str(arena.models["base"]), str(arena.stores["base"])
    full = {"prompts": arena.prompts, "max_new_tokens": arena.size.new_tokens}
    capped = {"max_prompts": arena.size.slow_prompts, "max_new_tokens": arena.size.slow_tokens}
    rows = [
        Contestant("resident", "resident", "base", model, limited=False, **full),
        Contestant("all in slots", "melinoe", "base", stored, slots=experts, limited=False, **full),
        Contestant("quarter", "melinoe", "base", stored, slots=quarter_slots, **full),
        Contestant(
            "accelerate", "accelerate", "base", model, offload_folder=str(arena.offload_folder),
            prompts=arena.prompts, **capped,
        ),
    ]  # fmt: skip
    found = speed.run(arena, rows, quarter_slots, lambda text: print(text, flush=True))["rows"]
    resident, hits, quarter, peer = found
    top_k = round(quarter["loads_per_token"] / (1 - quarter["hit_rate"]) / len(store.layers))
    misses = np.random.default_rng(0).binomial(top_k, 1 - quarter["hit_rate"], size=400)
    bare = record_bandwidth(store, 3.0, group_sizes=misses[misses > 0].tolist())
    rate = "generation_tokens_per_second"
    ratios = {
        "misses": quarter["read_bandwidth"] / bare,
        "hits": hits["carried_over"][rate] / resident[rate],  # the second pass finds all it asks for
        "peer": quarter[rate] / peer[rate],
    }
    print({name: round(value, 3) for name, value in ratios.items()}, flush=True)
    return {"ratios": ratios, "bare_reader_bytes_per_second": bare, "rows": found}


if __name__ == "__main__":
    main()
