"""Time to the first token of long prompts: experts paged, and everything resident in stock transformers.

    python benchmarks/prefill.py --folder /big/disk --output result.json
    python benchmarks/prefill.py --folder /big/disk --tokens 8192 --memory 2GiB     (chunks in a budget)

Writes layers of OLMoE-1B-7B's shape (random weights, kept and used again) and their store. Contestants take
turns in one process; ours begin with empty slots, but for `warm`, whose slots hold every expert already. With
--memory one process of ours runs under a cgroup instead, whose peak is compared with the budget.

    ceiling  the larger of what the warm model takes and of what a bare reader takes for the bytes that were
             read: what a run could take in which one hides behind the other altogether
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from common import begin, memory_limit, parser_of, run_json, spread, turns, write_result, written
from melinoe import convert
from melinoe.config import parse_bytes
from melinoe.demonstration.race import drop_page_cache
from melinoe.runtime.bare_reader import record_bandwidth
from melinoe.runtime.generation import generate
from melinoe.runtime.load import load, load_resident, load_tokenizer, reset_slots, stats
from random_olmoe import VOCABULARY, write_olmoe

ALL = "all slots"
PAGED = {ALL: 64, "16 of 64": 16}
READ_SECONDS = 0.5  # of each bare reader
BESIDE = 1400 * 2**20  # of the cgroup, for the interpreter and its libraries


def prompt_of(tokens: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, tokens).tolist()


class Contestants:
    def __init__(self, source: Path, store: Path) -> None:
        self.resident, self.tokenizer = load_resident(source)
        self.paged = {name: load(store, slots=slots) for name, slots in PAGED.items()}

    def measure(self, name: str, prompt: list[int]) -> dict[str, dict[str, Any]]:
        """Of each row: seconds to the first token; of ours the bytes read, and how long they were awaited."""
        if name == "resident":
            text, said = generate(self.resident, self.tokenizer, prompt, max_new_tokens=1)
            return {name: {"seconds": said.ttft_seconds, "text": text}}
        reset_slots(self.paged[name])
        found = {name: self._paged(name, prompt)}
        if name == ALL:
            found["warm"] = self._paged(name, prompt)
        return found

    def _paged(self, name: str, prompt: list[int]) -> dict[str, Any]:
        model = self.paged[name]
        pager = model.melinoe_paged.pager
        read, busy = pager.reader.bytes_read, pager.reader.busy_seconds
        waited = stats(model).stalled_seconds
        text, found = generate(model, self.tokenizer, prompt, max_new_tokens=1)
        result = {"seconds": found.ttft_seconds, "text": text, "bytes": pager.reader.bytes_read - read}
        result |= {"reading": pager.reader.busy_seconds - busy}
        result |= {"waited": stats(model).stalled_seconds - waited}
        return result | {"bandwidth": record_bandwidth(pager.store, READ_SECONDS)}


def compare(options: Any, source: Path, store: Path) -> None:
    contestants, found = Contestants(source, store), {}
    names = ["resident", *PAGED]
    for tokens in options.tokens:
        for name in names:  # kernels are made, the C library takes its memory
            contestants.measure(name, prompt_of(tokens, 0))
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("resident", "warm", *PAGED)}
        for number, name in turns(names, options.rounds):
            for row, one in contestants.measure(name, prompt_of(tokens, number)).items():
                runs[row].append(one)
        for name in PAGED:
            assert [one["text"] for one in runs[name]] == [one["text"] for one in runs["warm"]], name
        found[tokens] = runs
        table(tokens, runs)
    write_result(options, runs=found)


def table(tokens: int, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Seconds and ratios, round by round."""
    print(f"{tokens} tokens: seconds, / resident, / ceiling, waited, GB read, GB/s of a bare reader")
    resident, warm = ([one["seconds"] for one in runs[name]] for name in ("resident", "warm"))
    for name, rows in runs.items():
        seconds = [one["seconds"] for one in rows]
        parts = [f"{name:10s}", written(seconds), written(np.divide(seconds, resident).tolist())]
        if "bytes" in rows[0]:
            ceilings = [
                max(one["bytes"] / one["bandwidth"], arithmetic)
                for one, arithmetic in zip(rows, warm, strict=True)
            ]
            parts += [
                written(np.divide(seconds, ceilings).tolist()),
                written([one["waited"] for one in rows]),
            ]
            parts += [f"{rows[0]['bytes'] / 1e9:.2f}", written([one["bandwidth"] / 1e9 for one in rows])]
        print(" | ".join(parts), flush=True)


def budgeted(store: str, tokens: int, memory: str, rounds: int) -> None:
    """In a process of its own: one JSON object with what each request says of itself."""
    model = load(store, memory=memory, context=tokens + 1)
    tokenizer, runs = load_tokenizer(store), []
    for number in range(rounds):
        reset_slots(model)
        _, found = generate(model, tokenizer, prompt_of(tokens, number), max_new_tokens=1)
        runs.append(found.to_json() | {"slots": model.melinoe_budget.slots})
    print(json.dumps(runs))


def in_budget(options: Any, store: Path) -> None:
    measured = {}
    for tokens in options.tokens:
        budget = parse_bytes(options.memory)
        with memory_limit(budget + BESIDE) as limit:
            drop_page_cache(store.parent)
            command = [sys.executable, __file__, "--folder", str(options.folder), "--own", str(tokens)]
            command += ["--memory", options.memory, "--rounds", str(options.rounds)]
            command += ["--layers", str(options.layers)]
            found = run_json(command, limit)
            if found is None:
                raise SystemExit("killed: out of memory")
        runs = found["output"]
        took, peak = (spread([run[name] for run in runs]) for name in ("ttft_seconds", "model_memory_bytes"))
        print(
            f"{tokens} tokens in {options.memory}, {runs[0]['slots']} slots: {took['median']:.2f} s"
            f" ({took['lowest']:.2f} to {took['highest']:.2f}), {runs[0]['prefill_loads']} loads; took"
            f" {peak['highest'] / 2**20:.0f} MiB beyond what the process had, planned"
            f" {runs[0]['planned_bytes'] / 2**20:.0f}; cgroup at most"
            f" {found['peak_cgroup_bytes'] / 2**20:.0f} of {(budget + BESIDE) / 2**20:.0f} MiB",
            flush=True,
        )
        measured[tokens] = found
    write_result(options, runs=measured)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="a folder on a disk with 6 GB free")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", help="one process of ours inside this budget instead")
    parser.add_argument("--own", type=int, help="tokens; what that process is started with")
    options = begin(parser)
    source, store = options.folder / f"olmoe-{options.layers}", options.folder / f"store-{options.layers}"
    if options.own:
        budgeted(str(store), options.own, options.memory, options.rounds)
        return
    write_olmoe(source, options.layers, context=2**15)
    if not store.exists():
        convert(source, store)
    if options.memory:
        in_budget(options, store)
    else:
        compare(options, source, store)


if __name__ == "__main__":
    main()
