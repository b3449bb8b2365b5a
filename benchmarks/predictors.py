"""What a prediction of a sequence's experts is worth, beside what costs nothing.

    python benchmarks/predictors.py --model ../shared/models/t0-olmoe --train ../shared/data/t0mix \\
        --test ../shared/data/t0mix,../shared/data/gsm8k --output result.json

Fits a predictor to the routing of train rows and replays test rows, each sequence from empty slots, under
scores from: the global frequencies of the train rows, the routing of the prompt itself (prefill), the ten
train prompts that are most like it (nearest), the network, network and prefill together, and the sequence's
own requests (oracle). A folder that is not among --train is out of domain. With --encoder FOLDER also the
ten prompts that a sentence encoder finds most alike, as the paper embeds prompts (BAAI/bge-base-en-v1.5, say;
`pip install sentence-transformers`; not measured here, where no such weights can be had).

recall C: share of decoding's requests that the C best-scored experts of each layer serve. static: the default
policy's rival that keeps exactly these. decay: the default policy, which always counts the prompt's routing,
with the scores as its prior. Loads are those after decoding starts, per decoded token, with the ratio to
decay without a prior (95 percent, bootstrap over sequences). Preloads are read before decoding starts
although the prompt did not ask for them; wasted are those that were not asked for while they were there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import begin, parser_of, temporary_folder, write_result
from melinoe.measure.intervals import ratio_of_sums
from melinoe.measure.trace import open_model, trace
from melinoe.prediction.features import prompt_features
from melinoe.prediction.fit import Predictor, fit_predictor, recall
from melinoe.prediction.rivals import decoded_lengths, nearest, overall, with_prefill
from melinoe.routing.policies import DECODE, PREFILL, Strength
from melinoe.routing.simulate import simulate
from melinoe.routing.trace import Trace, joined


def sentence_vectors(folder: str, tokenizer: Any, prompts: list[list[int]]) -> torch.Tensor:
    """[S, D] of a sentence encoder, which reads what is said and no template's marks."""
    from sentence_transformers import SentenceTransformer

    texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    return torch.from_numpy(SentenceTransformer(folder, device="cpu").encode(texts)).float()


def scores_of(
    train: Trace, test: Trace, predictor: Predictor, encoder: str | None = None, tokenizer: Any = None
) -> dict[str, np.ndarray]:
    """{name: [S, L, E]} for the sequences of `test`."""
    known, asked = (
        torch.stack([prompt_features(predictor.table, prompt) for prompt in one.prompts()])
        for one in (train, test)
    )
    network, _ = predictor.predict_all(test.prompts())
    found = {
        "global": np.broadcast_to(overall(train), network.shape).copy(),
        "prefill": test.frequencies(PREFILL),
        "nearest": nearest(known, asked, train.frequencies(DECODE)),
        "network": network,
        "network + prefill": with_prefill(network, test, predictor.strength.tokens),
        "oracle": test.frequencies(DECODE),
    }
    if encoder is not None:
        known, asked = (sentence_vectors(encoder, tokenizer, one.prompts()) for one in (train, test))
        found["encoder"] = nearest(known, asked, train.frequencies(DECODE))
    return found


def replay(
    test: Trace, slots: int, scores: dict[str, np.ndarray], strengths: list[Strength]
) -> list[dict[str, Any]]:
    """One row for every policy and every kind of scores."""
    lengths = torch.from_numpy(decoded_lengths(test)).float()
    frequencies = torch.from_numpy(test.frequencies(DECODE))
    runs: list[tuple[str, str, np.ndarray | None]] = [("decay", "none", None), ("lru", "none", None)]
    runs += [("belady", "none", None)]
    runs += [("static", name, given) for name, given in scores.items()]
    # what counts the prompt already needs no scores of the prompt
    runs += [("decay", name, given) for name, given in scores.items() if "prefill" not in name]
    rows: list[dict[str, Any]] = []
    bar: Any = None
    for policy, name, given in runs:
        [found] = simulate(
            test, policy, slots, predictor_scores=given, strength=strengths, per_sequence=True
        )["results"]
        loads = found.pop("per_sequence")["loads"]
        bar = loads if bar is None else bar
        row = {"policy": policy, "scores": name, "ratio": ratio_of_sums(loads, bar), **found}
        if given is not None:
            row["recall"] = recall(torch.from_numpy(given).float(), frequencies, lengths, slots)
        rows.append(row)
        print_row(row)
    return rows


def print_row(row: dict[str, Any]) -> None:
    ratio, seen = row["ratio"], f"{row['recall']:.3f}" if "recall" in row else "-"
    print(
        f"| {row['policy']} | {row['scores']} | {seen} | {row['loads_per_token']:.3f}"
        f" | {ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
        f" | {row['preload_loads_per_sequence']:.2f} | {row['wasted_preloads_per_sequence']:.2f} |",
        flush=True,
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    opened = open_model(options.model, options.adapter)
    common: dict[str, Any] = {"max_length": options.max_length, "progress": False}
    traces = [
        trace(opened, data, split="train", limit=options.rows, **common) for data in options.train.split(",")
    ]
    train = joined(traces)
    with temporary_folder("predictors") as folder:
        report = fit_predictor(opened, train, folder / "predictor", slots=options.slots)
        predictor = Predictor.load(folder / "predictor", opened[0])
    slots = report["slots"]
    print({name: value for name, value in report.items() if name != "fingerprint"}, flush=True)
    result: dict[str, Any] = {"fit": report, "slots": slots, "test": {}}
    for data in options.test.split(","):
        test = trace(opened, data, split="test", limit=options.test_rows, **common)
        print(f"\n{data}: {test.num_sequences} sequences, {int(test.decoded.sum())} decoded tokens\n")
        print(f"| policy | scores | recall {slots} | loads/token | / decay | preloads | wasted |")
        print("|---|---|---:|---:|---:|---:|---:|")
        scores = scores_of(train, test, predictor, options.encoder, opened[1])
        _, strengths = predictor.predict_all(test.prompts())
        result["test"][data] = replay(test, slots, scores, strengths)
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--train", default="tiny", help="folders of rows to fit to, separated by commas")
    parser.add_argument("--test", default="tiny", help="folders of rows to measure on")
    parser.add_argument("--rows", type=int, default=1000, help="train rows of each folder")
    parser.add_argument("--test-rows", type=int, default=200, help="test rows of each folder")
    parser.add_argument("--slots", type=int, help="of each layer [default: a quarter of the experts]")
    parser.add_argument("--encoder", help="folder of a sentence encoder, one more rival")
    parser.add_argument("--max-length", type=int, default=400)
    options = begin(parser)
    write_result(options, **run(options))


if __name__ == "__main__":
    main()
