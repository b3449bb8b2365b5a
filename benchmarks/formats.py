"""What a store format costs in quality, saves in bytes, and does to decoding speed.

    python benchmarks/formats.py --model tiny --rows 600 --exact-rows 200 --work W --output result.json
    python benchmarks/formats.py --model ../shared/models/t0-olmoe --data ../shared/data/t0mix --rows 600 \\
        --work W --output result.json
    python benchmarks/formats.py --model tiny --speed --work W --output result.json

Quality: converts to auto, int8 and int4, opens each store with a quarter of the experts in slots, and
compares on the same held-out rows: NLL, teacher-forced, and exact match of greedy completions where asked
for. Intervals: 95 percent, bootstrap over rows, both formats on the same rows.

Speed (--speed): the model widened to records of real size, each format in packed and expanded slots inside
the same memory: what is left for slots after the resident weights is --share of the bytes of all experts in
the model's own dtype. Prompts are cold, one after the other; the combinations take turns, --repeats times.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import melinoe
from common import begin, close, parser_of, spread, turns, write_result, written
from melinoe.config import format_bytes
from melinoe.data.rows import data_rows
from melinoe.demonstration.widen import widen
from melinoe.measure.intervals import ratio_of_sums
from melinoe.measure.quality import evaluate
from melinoe.models.folder import resolve_model
from melinoe.report.setting import data_folder
from melinoe.runtime.generation import generate
from melinoe.runtime.load import load_tokenizer, reset_slots
from melinoe.runtime.load import plan as plan_of
from melinoe.store.manifest import Store, is_store, open_store
from melinoe.store.packing import FORMATS

SPEED_FORMATS = [("auto", "expanded")] + [
    (name, way) for name in FORMATS[1:] for way in ("packed", "expanded")
]


def stores(source: str | Path, work: Path) -> dict[str, Store]:
    """One store for each format; what is there already is used again."""
    for name in FORMATS:
        if not is_store(work / name):
            melinoe.convert(source, work / name, format=name, progress=False)
    return {name: open_store(work / name) for name in FORMATS}


def quality(opened: dict[str, Store], data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """{format: bytes, NLL, perplexity, exact match, and the ratios to auto}."""
    found: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for name, store in opened.items():
        model = melinoe.load(store.folder, slots=max(1, store.layers[0].num_experts // 4))
        pair = (model, load_tokenizer(store.folder))
        common: dict[str, Any] = {"split": "test", "per_row": True, "progress": False}
        scored = evaluate(pair, data, limit=options.rows, metrics=("perplexity",), **common)
        rows[name] = scored["per_row"]
        found[name] = {
            "record_bytes": store.max_record_bytes,
            "expert_bytes": store.expert_bytes,
            "rows": scored["num_rows"],
            "tokens": scored["num_tokens"],
            "nll": scored["nll"],
            "perplexity": scored["perplexity"],
            "nll_ratio": ratio_of_sums(rows[name]["nll"], rows["auto"]["nll"]),
        }
        if options.exact_rows:
            exact = evaluate(pair, data, limit=options.exact_rows, metrics=("exact_match",), **common)
            rows[name] = rows[name] | {"exact": exact["per_row"]["exact_match"]}
            found[name] |= {
                "exact_rows": exact["num_rows"],
                "exact_match": exact["exact_match"],
                "exact_ratio": ratio_of_sums(rows[name]["exact"], rows["auto"]["exact"]),
            }
        close(model)
        print_quality(name, found[name], found["auto"])
    return found


def interval(value: dict[str, float]) -> str:
    return f"{value['ratio']:.4f} ({value['low']:.4f} to {value['high']:.4f})"


def print_quality(name: str, row: dict[str, Any], auto: dict[str, Any]) -> None:
    """One row of the table in docs/results.md."""
    exact = f"{row['exact_match']:.3f} | {interval(row['exact_ratio'])}" if "exact_match" in row else "- | -"
    share = row["expert_bytes"] / auto["expert_bytes"]
    print(
        f"| {name} | {row['record_bytes']} | {row['expert_bytes']} | {share:.3f} | {row['nll']:.5f} "
        f"| {row['perplexity']:.4f} | {interval(row['nll_ratio'])} | {exact} |",
        flush=True,
    )


def decode(store: Store, way: str, memory: int, prompts: list[Any], new_tokens: int) -> dict[str, Any]:
    """One contestant from load to close: its texts, its speed and its counters."""
    model = melinoe.load(store.folder, memory=memory, slots_format=way)
    tokenizer = load_tokenizer(store.folder)
    tokens, seconds, texts = 0, 0.0, []
    for prompt in prompts:
        reset_slots(model)
        text, one = generate(model, tokenizer, prompt, max_new_tokens=new_tokens, ignore_eos=True)
        tokens, seconds = tokens + one.generated_tokens - 1, seconds + one.seconds - one.ttft_seconds
        texts.append(text)
    counted = melinoe.stats(model)
    close(model)
    return {
        "texts": texts,
        "slots": plan_of(model).slots,
        "tokens_per_second": tokens / seconds,
        "hit_rate": counted.hit_rate,
        "bytes_per_token": counted.bytes_per_token,
    }


def speed(opened: dict[str, Store], data: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Decoding speed of every format and kind of slots inside the same memory."""
    first = melinoe.plan(opened["auto"].folder, slots=0, measure_seconds=0)["budget"]
    memory = first["total_bytes"] + int(opened["auto"].expanded_bytes * options.share)
    prompts = [row.prompt for row in data_rows(data, "test", options.prompts)]
    contestants = {f"{name}, {way}": (name, way) for name, way in SPEED_FORMATS}
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in contestants}
    texts: dict[str, list[str]] = {}
    for _, label in turns(list(contestants), options.repeats):
        name, way = contestants[label]
        run = decode(opened[name], way, memory, prompts, options.new_tokens)
        said = run.pop("texts")
        assert texts.setdefault(name, said) == said, "packed and expanded must say the same"
        runs[label].append(run)
    print(f"memory {format_bytes(memory)}, records of {format_bytes(opened['auto'].max_record_bytes)}")
    result = []
    for label, (name, way) in contestants.items():
        speeds = [run["tokens_per_second"] for run in runs[label]]
        row = runs[label][0] | {"tokens_per_second": spread(speeds), "memory": memory}
        result.append({"format": name, "slots_format": way} | row)
        print(
            f"| {name} | {way} | {row['slots']} | {row['hit_rate']:.3f} "
            f"| {format_bytes(row['bytes_per_token'])} | {written(speeds)} |",
            flush=True,
        )
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", help="a folder with test.jsonl; tiny has its own")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--exact-rows", type=int, default=0)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--record-bytes", type=int, default=6 * 2**20, help="with --speed: size of a record")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the stores, which stay there")
    options = begin(parser)
    work, source = options.work, resolve_model(options.model)
    data = data_folder(options.model, options.data)
    work.mkdir(parents=True, exist_ok=True)
    if options.speed:
        if not (work / "wide").is_dir():
            widen(source, work / "wide", options.record_bytes)
        write_result(options, speed=speed(stores(work / "wide", work), data, options))
    else:
        write_result(options, quality=quality(stores(source, work), data, options))


if __name__ == "__main__":
    main()
