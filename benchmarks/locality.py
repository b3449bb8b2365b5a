"""Does tuning pay? Tuned against control, paired and teacher-forced, on held-out rows.

    python benchmarks/locality.py --model tiny --work W --output result.json
    python benchmarks/locality.py --model ../shared/models/t0-olmoe --data ../shared/data/t0mix ../shared/data/gsm8k \\
        --hold-out 700 --rows 3200 --seeds 0 1 2 --work W --output result.json

For every seed runs `tune` twice (with our losses and without), merges both, and on the same held-out rows compares
expert loads per decoded token (policies decay and LRU, cold for each sequence) and completion NLL. Intervals: 95
percent, bootstrap over sequences. Held out are the test rows and, with --hold-out N, the last N rows of each train
file, which are then not trained on. A run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from melinoe.bench.quality import evaluate
from melinoe.bench.stages import Verb, run_verbs
from melinoe.config import resolve_model
from melinoe.routing.simulate import paired_difference, simulate
from melinoe.tracing import trace


def combine(folders: list[str], hold_out: int, target: Path) -> None:
    """One data folder of several: train without its held-out end, and test with it."""
    target.mkdir(parents=True, exist_ok=True)
    train, test = [], []
    for folder in folders:
        rows, held_out = (
            (Path(folder) / f"{split}.jsonl").read_text().strip("\n").split("\n")
            for split in ("train", "test")
        )  # not splitlines: text may hold other line ends
        train += rows[: len(rows) - hold_out]
        test += held_out + rows[len(rows) - hold_out :]
    (target / "train.jsonl").write_text("\n".join(train) + "\n")
    (target / "test.jsonl").write_text("\n".join(test) + "\n")


def tune_and_merge(source: str, data: Path, options: argparse.Namespace, seed: int, work: Path) -> None:
    """Leaves work/control-merged and work/tuned-merged."""
    off = {"control": ["--lambda-cs", "0", "--lambda-rm", "0"], "tuned": []}
    common = ["--model", source, "--data", str(data), "--seed", str(seed), "--slots", str(options.slots)]
    common += ["--max-steps", str(options.steps)]
    todo = [name for name in off if not (work / f"{name}-merged").is_dir()]
    run_verbs(
        [Verb(name, ["tune", *common, *off[name], "--output-dir", str(work / name)]) for name in todo], work
    )
    merges = [["--adapter", str(work / name), "--output-dir", str(work / f"{name}-merged")] for name in todo]
    run_verbs([Verb("merge", ["merge", "--model", source, *arguments]) for arguments in merges], work)


def measure(model: str, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """NLL and loads of one set of weights; what paired comparisons need is below "pairs"."""
    scored = evaluate(model, data, limit=options.rows, metrics=("perplexity",), per_row=True, progress=False)
    recorded = trace(model, data, limit=options.rows, split="test", progress=False)
    policies = simulate(recorded, "decay,lru", options.slots, per_sequence=True)["results"]
    per_row = scored["per_row"]
    found = {"nll": scored["nll"], "num_sequences": scored["num_rows"]} | {
        f"{row['policy']}_{key}": row[key] for row in policies for key in ("hit_rate", "loads_per_token")
    }
    pairs = {row["policy"]: row for row in policies}
    pairs["nll"] = {"per_sequence": {"loads": per_row["nll"], "tokens": per_row["tokens"]}}
    return {"found": found, "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", nargs="+", help="folders of train and test.jsonl; tiny has its own")
    parser.add_argument("--hold-out", type=int, default=0)
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", required=True, help="a folder for adapters and merged checkpoints")
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    work, source = Path(options.work), str(resolve_model(options.model))
    if options.data is None:
        from melinoe.tiny import data_path

        options.data = [str(data_path())]
    combine(options.data, options.hold_out, work / "data")
    base = measure(source, work / "data", options)
    result: dict[str, Any] = {"settings": vars(options), "base": base["found"], "seeds": []}
    print_row("base", base["found"])
    for seed in options.seeds:
        folder = work / f"seed-{seed}"
        folder.mkdir(exist_ok=True)
        tune_and_merge(source, work / "data", options, seed, folder)
        control, tuned = (
            measure(str(folder / f"{n}-merged"), work / "data", options) for n in ("control", "tuned")
        )
        ratios = {
            name: paired_difference(tuned["pairs"][name], control["pairs"][name])
            for name in ("decay", "lru", "nll")
        }
        result["seeds"].append(
            {"seed": seed, "control": control["found"], "tuned": tuned["found"], "tuned_over_control": ratios}
        )
        print_row(f"control, seed {seed}", control["found"])
        print_row(f"tuned, seed {seed}", tuned["found"])
        for name, ratio in ratios.items():
            line = f"{ratio['ratio']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f})"
            print(f"  tuned / control, {name}: {line}", flush=True)
        Path(options.output).write_text(json.dumps(result, indent=1, default=float))


def print_row(name: str, found: dict[str, Any]) -> None:
    """One row of the table in docs/results.md."""
    print(
        f"| {name} | {found['nll']:.5f} | {found['num_sequences']} | {found['decay_loads_per_token']:.3f} "
        f"| {found['decay_hit_rate']:.3f} | {found['lru_loads_per_token']:.3f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
