"""Decoding inside a budget over the larger of its arithmetic and its transfer: what hides behind what.

    python benchmarks/overlap.py --model ../shared/models/t0-olmoe --data ../shared/data/gsm8k --folder F
    python benchmarks/overlap.py --model MODEL --tuned ADAPTER --data DATA --folder F --output result.json

Models are widened to records of 3 MiB, merged, and converted (kept in the folder). For each, answers inside a
budget (256MiB is what `melinoe bench` gives under a limit of 600) take turns with the same answers from slots
that hold every expert already.

    arithmetic  seconds of a token with every expert at hand
    transfer    bytes read for a token over what a bare reader reaches beside it, with as many records at once
    ratio       seconds of a token inside the budget / the larger of both; 1: one hides behind the other
    sum         the same / both, one after the other; 1: nothing hides
    waited      share of the time that the computation waited for a record
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import begin, close, parser_of, write_result, written
from melinoe import convert, merge
from melinoe.benchmark.prepare import prompts_of
from melinoe.data.rows import read_rows
from melinoe.demonstration.watched import generate_watched
from melinoe.demonstration.widen import widen
from melinoe.runtime.bare_reader import record_bandwidth
from melinoe.runtime.load import load, load_tokenizer, reset_slots, stats

READ_SECONDS = 0.2  # of each bare reader
RECORD_BYTES = 3 * 2**20


def stores(options: Any) -> dict[str, Path]:
    """{"base auto": folder, ...}"""
    found = {}
    for name, adapter in (("base", None), ("tuned", options.tuned)):
        if name == "tuned" and adapter is None:
            continue
        source, wide = options.model, options.folder / name
        if adapter is not None:
            source = options.folder / "merged"
            if not source.exists():
                merge(options.model, adapter, source)
        if not wide.exists():
            widen(source, wide, RECORD_BYTES)
        for form in options.formats:
            found[f"{name} {form}"] = options.folder / f"{name}-{form}"
            if not found[f"{name} {form}"].exists():
                convert(wide, found[f"{name} {form}"], format=form, progress=False)
    return found


def step(model: Any, tokenizer: Any, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Of a token behind the first: seconds, waited, loads, bytes; and the tokens."""
    stats(model).reset()
    watched: list[float] = []
    found, times = generate_watched(
        model, tokenizer, prompt, tokens, watch=lambda: stats(model).stalled_seconds, watched=watched
    )
    counted, steps = stats(model), len(found) - 1
    return {
        "seconds": (times[-1] - times[0]) / steps,
        "waited": (watched[-1] - watched[0]) / steps,
        "loads": counted.decode_loads / steps,
        "bytes": counted.decode_bytes / steps,
        "tokens": found,
    }


def measure(store: Path, options: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Both sides for every prompt and round."""
    longest = max(map(len, prompts)) + options.new_tokens
    models = {
        "budget": load(store, memory=options.memory, context=longest),
        "all": load(store, slots=options.experts),
    }
    tokenizer, runs = load_tokenizer(store), []
    layers = len(models["all"].melinoe_paged.pager.store.layers)
    for model in models.values():
        generate_watched(model, tokenizer, prompts[0][:8], 8)  # a step is recorded
    for number in range(options.rounds):
        for prompt in prompts:
            found: dict[str, Any] = {}
            for name in ("budget", "all")[:: 1 if number % 2 == 0 else -1]:
                model = models[name]
                if name == "budget":
                    reset_slots(model)
                else:
                    generate_watched(model, tokenizer, prompt, options.new_tokens)  # what it needs
                found[name] = step(model, tokenizer, prompt, options.new_tokens)
            assert found["budget"].pop("tokens") == found["all"].pop("tokens")
            misses = max(1, round(found["budget"]["loads"] / layers))
            pager = models["budget"].melinoe_paged.pager
            found["bandwidth"] = record_bandwidth(pager.store, READ_SECONDS, number, group_sizes=(misses,))
            found["slots"] = models["budget"].melinoe_budget.slots
            runs.append(found)
    for model in models.values():
        close(model)
    return runs


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tuned", type=Path, help="an adapter")
    parser.add_argument("--data", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=["auto", "int8"])
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--experts", type=int, default=32, help="of a layer")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = begin(parser)
    options.folder.mkdir(parents=True, exist_ok=True)
    made, found = stores(options), {}
    prompts = prompts_of(read_rows(options.data, "test", limit=40), Path(options.model), options.prompts, 0)
    print("ms of a token | arithmetic | transfer | ratio | sum | waited | loads | slots")
    for name, store in made.items():
        found[name] = measure(store, options, prompts)
        show(name, found[name])
    write_result(options, runs=found)


def show(name: str, runs: list[dict[str, Any]]) -> None:
    took, arithmetic = ([1e3 * run[side]["seconds"] for run in runs] for side in ("budget", "all"))
    transfer = [1e3 * run["budget"]["bytes"] / run["bandwidth"] for run in runs]
    three = list(zip(took, arithmetic, transfer, strict=True))
    parts = [f"{name:10s}", written(took), written(arithmetic), written(transfer)]
    parts += [written([a / max(b, c) for a, b, c in three]), written([a / (b + c) for a, b, c in three])]
    parts += [written([run["budget"]["waited"] / run["budget"]["seconds"] for run in runs])]
    loads = written([run["budget"]["loads"] for run in runs])
    print(" | ".join([*parts, loads, str(runs[0]["slots"])]), flush=True)


if __name__ == "__main__":
    main()
