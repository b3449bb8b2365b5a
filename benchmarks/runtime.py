"""How close the runtime comes to its ceilings, how far ahead of its peer it is, what `convert` gains.

    python benchmarks/runtime.py --model tiny --output result.json      (make bench)

Ratios from one run:

    misses   bytes over the time in which a read is outstanding, over what a bare reader reaches with the same
             record size, threads and misses per layer                                          aim >= 0.85
    hits     decoding with every expert in slots, over the resident model with grouped_mm       aim >= 1
    cpu      the same by the processor seconds of whole requests, which do not depend on other work on the
             machine
    convert  decoding at a quarter of the experts from a converted store, over decoding in place from the
             checkpoint's own shards
    reading  the same for two bare readers, without a model
    peer     decoding at a quarter of the experts, over accelerate's disk_offload of the
             experts: same widened model, same memory limit                                     aim >= 10

All but the last are pairs: both sides of a ratio, one after the other, for one prompt, in one process, the
order turning, so that other work on the machine meets both alike. `others` is the share of our cores' time
that it took during each pair, and a second table has the quiet half of the pairs. The contestants of the last
ratio run in a process of their own each, under one memory limit, page cache dropped. The tables give the
median, the quartiles and the range. Every side's tokens are compared with the resident model's.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from common import begin, parser_of, spread, temporary_folder, write_result
from melinoe.conversion.in_place import index_in_place
from melinoe.data.rows import read_rows
from melinoe.demonstration.arena import Arena, Size, prepare
from melinoe.demonstration.contestants import Contestant
from melinoe.demonstration.race import race
from melinoe.models.folder import resolve_model
from melinoe.report.setting import data_folder
from melinoe.runtime.bare_reader import record_bandwidth
from melinoe.runtime.generation import stream_generate
from melinoe.runtime.load import load, load_tokenizer, reset_slots
from melinoe.store.manifest import open_store

RECORD_BYTES = 3 * 2**20
READ_SECONDS = 0.7  # of each bare reader
NAMES = ("misses", "hits", "cpu", "convert", "reading", "others")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", help="folder with test.jsonl; the embedded workload if not given")
    parser.add_argument("--record-bytes", type=int, default=RECORD_BYTES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=int, help="rounds of the last ratio; as the others if not given")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    options = begin(parser)
    rows = read_rows(data_folder(options.model, options.data), "test", limit=200)
    random.Random(0).shuffle(rows)
    size = Size(options.prompts, options.tokens, 1, 6)
    with temporary_folder("bench") as folder:
        source = str(resolve_model(options.model))
        arena = prepare({"base": source}, folder / "wide", options.record_bytes, rows, size, 0)
        peers = [peer(arena) for _ in range(options.rounds if options.peers is None else options.peers)]
        pairs = Pairs(arena, folder / "in-place")
        measured = [
            pairs.measure(prompt, number)
            for number in range(options.rounds)
            for prompt in arena.prompts[: options.prompts]
        ]
    quiet = sorted(measured, key=lambda one: one["others"])[: (len(measured) + 1) // 2]
    found = {name: [one[name] for one in measured] for name in NAMES}
    found |= {"peer": [one["ratio"] for one in peers]} if peers else {}
    table(found)
    table({name: [one[name] for one in quiet] for name in NAMES})
    ratios = {name: spread(values) for name, values in found.items()}
    write_result(options, ratios=ratios, pairs=measured, peers=peers)


def table(columns: dict[str, list[float]]) -> None:
    names = ("median", "q1", "q3", "lowest", "highest")
    print(f"{'':<8}{'n':>4}" + "".join(f"{name:>10}" for name in names))
    for name, values in columns.items():
        row = spread(values)
        print(f"{name:<8}{len(values):>4}" + "".join(f"{row[column]:>10.3f}" for column in names))


def core_seconds() -> tuple[float, float]:
    """(seconds that the cores we may use were busy, seconds of them that were ours), since some time."""
    ticks, cores = os.sysconf("SC_CLK_TCK"), {f"cpu{core}" for core in os.sched_getaffinity(0)}
    busy = 0.0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in cores:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields[:8])
            busy += (user + nice + system + irq + softirq + steal) / ticks
    return busy, time.process_time()


class Pairs:
    """The resident model, ours with all experts in slots, and two with a quarter: converted and in place."""

    def __init__(self, arena: Arena, in_place: Path) -> None:
        wide, store = arena.models["base"], arena.stores["base"]
        index_in_place(wide, in_place)
        self.stores = {"quarter": open_store(store), "in place": open_store(in_place)}
        experts = max(layer.num_experts for layer in self.stores["quarter"].layers)
        self.tokenizer, self.tokens = load_tokenizer(wide), arena.size.new_tokens
        self.models = {
            "resident": AutoModelForCausalLM.from_pretrained(
                wide, dtype="auto", experts_implementation="grouped_mm"
            ).eval(),
            "all in slots": load(store, slots=experts),
            "quarter": load(store, slots=max(1, experts // 4)),
            "in place": load(in_place, slots=max(1, experts // 4)),
        }
        self.cpu_seconds: dict[str, float] = {}  # of the last request of each
        for prompt in arena.prompts:  # all that they ask for comes into the slots
            self._generate("all in slots", prompt)

    def _generate(self, name: str, prompt: list[int]) -> tuple[float, list[int]]:
        tokens, speed_reached, began = [], 0.0, time.process_time()
        pieces = stream_generate(
            self.models[name], self.tokenizer, prompt, max_new_tokens=self.tokens, ignore_eos=True
        )
        for piece in pieces:
            if piece.token is not None:
                tokens.append(piece.token)
            if piece.statistics is not None:
                speed_reached = piece.statistics.generation_tokens_per_second or 0.0
        self.cpu_seconds[name] = time.process_time() - began
        return speed_reached, tokens

    def _paged(self, name: str, prompt: list[int]) -> tuple[float, list[int], float, list[int]]:
        """(tok/s, tokens, bytes per second while a read is outstanding, misses of each layer's call)."""
        pager = self.models[name].melinoe_paged.pager
        reset_slots(self.models[name])
        pager.statistics.reset()
        read, busy = pager.reader.bytes_read, pager.reader.busy_seconds
        rate, tokens = self._generate(name, prompt)
        bandwidth = (pager.reader.bytes_read - read) / (pager.reader.busy_seconds - busy)
        found, calls = pager.statistics, (len(tokens) - 1) * len(pager.store.layers)
        asked = round(found.decode_requests / calls)
        drawn = np.random.default_rng(0).binomial(asked, found.decode_loads / found.decode_requests, size=400)
        return rate, tokens, bandwidth, drawn[drawn > 0].tolist()

    def measure(self, prompt: list[int], number: int) -> dict[str, Any]:
        """All sides for one prompt; every second round the other way round."""
        rates, bandwidths, tokens = {}, {}, {}
        began, (busy, own) = time.perf_counter(), core_seconds()
        for name in ("resident", "all in slots")[:: 1 if number % 2 == 0 else -1]:
            rates[name], tokens[name] = self._generate(name, prompt)
        for name in ("quarter", "in place")[:: 1 if number % 2 == 0 else -1]:
            rates[name], tokens[name], bandwidths[name], groups = self._paged(name, prompt)
            bandwidths[f"bare {name}"] = record_bandwidth(self.stores[name], READ_SECONDS, group_sizes=groups)
        if any(one != tokens["resident"] for one in tokens.values()):
            raise SystemExit("another token than the resident model's")
        result = {
            "misses": bandwidths["quarter"] / bandwidths["bare quarter"],
            "hits": rates["all in slots"] / rates["resident"],
            "cpu": self.cpu_seconds["resident"] / self.cpu_seconds["all in slots"],
            "convert": rates["quarter"] / rates["in place"],
            "reading": bandwidths["bare quarter"] / bandwidths["bare in place"],
        }
        seconds, (busy_now, own_now) = time.perf_counter() - began, core_seconds()
        cores = len(os.sched_getaffinity(0))
        result["others"] = max(0.0, (busy_now - busy) - (own_now - own)) / (seconds * cores)
        print({name: round(value, 3) for name, value in result.items()}, flush=True)
        return {**result, "tokens_per_second": rates, "bytes_per_second": bandwidths}


def peer(arena: Arena) -> dict[str, Any]:
    """One round of us and accelerate under one memory limit."""
    store = open_store(arena.stores["base"])
    slots = max(1, max(layer.num_experts for layer in store.layers) // 4)
    model, stored = str(arena.models["base"]), str(arena.stores["base"])
    capped: dict[str, Any] = {
        "max_prompts": arena.size.slow_prompts,
        "max_new_tokens": arena.size.slow_tokens,
    }
    full: dict[str, Any] = {"prompts": arena.prompts, "max_new_tokens": arena.size.new_tokens}
    rows = [
        Contestant("resident", "resident", "base", model, limited=False, **full),
        Contestant("quarter", "melinoe", "base", stored, slots=slots, **full),
        Contestant(
            "accelerate",
            "accelerate",
            "base",
            model,
            offload_folder=str(arena.offload_folder),
            prompts=arena.prompts,
            **capped,
        ),
    ]
    found = race(arena, rows, slots, lambda text: print(text, flush=True))["rows"]
    rate = "generation_tokens_per_second"
    return {"ratio": found[1][rate] / found[2][rate], "rows": found}


if __name__ == "__main__":
    main()
