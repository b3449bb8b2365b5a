"""Does tuning pay? Tuned against control, paired and teacher-forced, on held-out rows.

    python benchmarks/locality.py --model tiny --data DIR --rows 2400 --output result.json

Runs `tune` twice (with our losses and without), merges both, and on the same held-out rows compares
expert loads per decoded token (policy decay, a quarter of the experts, cold for each sequence) and completion NLL.
Intervals: bootstrap over sequences. Both folders stay in --work for a look.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from melinoe.bench.quality import evaluate
from melinoe.bench.stages import Verb, run_verbs
from melinoe.config import resolve_model
from melinoe.routing.simulate import paired_difference, simulate
from melinoe.tracing import trace


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", required=True, help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", required=True, help="a new folder for adapters and merged checkpoints")
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    work = Path(options.work)
    work.mkdir(parents=True)
    source = str(resolve_model(options.model))
    common = ["--model", source, "--data", options.data, "--seed", str(options.seed)]
    common += ["--max-steps", str(options.steps), "--slots", str(options.slots)]
    off = ["--lambda-cs", "0", "--lambda-rm", "0"]
    names = ("control", "tuned")
    run_verbs(
        [
            Verb(
                name, ["tune", *common, *(off if name == "control" else []), "--output-dir", str(work / name)]
            )
            for name in names
        ],
        work,
    )
    run_verbs(
        [
            Verb(
                f"merge {name}",
                [
                    "merge",
                    "--model",
                    source,
                    "--adapter",
                    str(work / name),
                    "--output-dir",
                    str(work / f"{name}-merged"),
                ],
            )
            for name in names
        ],
        work,
    )
    result: dict = {"settings": vars(options)}
    loads, rows = {}, {}
    for name, model in (("base", source), *((n, str(work / f"{n}-merged")) for n in names)):
        scored = evaluate(
            model, options.data, limit=options.rows, metrics=("perplexity",), per_row=True, progress=False
        )
        rows[name] = scored["per_row"]
        recorded = trace(model, options.data, limit=options.rows, split="test", progress=False)
        policies = simulate(recorded, "decay,lru", options.slots, per_sequence=True)["results"]
        loads[name] = policies[0]
        result[name] = {"nll": scored["nll"], "num_rows": scored["num_rows"]} | {
            f"{row['policy']}_{key}": row[key]
            for row in policies
            for key in ("hit_rate", "loads_per_token", "num_sequences")
        }
    result["loads_tuned_over_control"] = paired_difference(loads["tuned"], loads["control"])
    result["nll_tuned_over_control"] = paired_difference(_nll(rows["tuned"]), _nll(rows["control"]))
    Path(options.output).write_text(json.dumps(result, indent=1, default=float))
    print(json.dumps(result, default=float))


def _nll(rows: dict) -> dict:
    """Likelihoods in the form that paired_difference compares: sums per sequence, and its tokens."""
    return {"per_sequence": {"loads": rows["nll"], "tokens": rows["tokens"]}}


if __name__ == "__main__":
    main()
