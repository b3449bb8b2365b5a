"""Quality and locality of one set of weights on held-out rows: the same rows for all, teacher-forced.

Everything that a paired comparison needs is kept per sequence, as sums, so that seeds are pooled by
adding. Loads are those of the very policies that run on the device, each sequence from empty slots.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.config import DEFAULT_POLICY
from melinoe.errors import MelinoeError
from melinoe.measure.quality import evaluate
from melinoe.measure.trace import trace
from melinoe.prediction.fit import Predictor, fit_predictor
from melinoe.routing.concentration import load_entropy, static_hits
from melinoe.routing.paired import perplexity_ratio, ratio_of_sums
from melinoe.routing.policies import DECODE, POLICIES
from melinoe.routing.simulate import BOUNDS, simulate
from melinoe.routing.trace import Trace

PREDICTED = "decay + predictor"


@dataclass(frozen=True)
class Measuring:
    """What is measured on each set of weights.

    budgets: slots per layer.  policies: of the simulator.
    exact_rows: rows on which exact match and Rouge-L are judged as well (slow; 0: none).
    predictor_rows: train rows that a predictor is fitted to (0: none).
    """

    budgets: tuple[int, ...]
    policies: tuple[str, ...] = (DEFAULT_POLICY, "lru")
    exact_rows: int = 0
    predictor_rows: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(self.budgets))  # lists, where they come from a file
        object.__setattr__(self, "policies", tuple(self.policies))
        unknown = [name for name in self.policies if name not in (*POLICIES, *BOUNDS)]
        if unknown or not self.policies:
            raise MelinoeError(
                "sweep: policies", got=list(self.policies), allowed=", ".join([*sorted(POLICIES), *BOUNDS])
            )
        for name in ("exact_rows", "predictor_rows"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise MelinoeError(f"sweep: {name}", got=value, allowed="0 or more rows")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(opened: Any, data: Path, what: Measuring, predictor: Path | None = None) -> dict[str, Any]:
    """Measures on data/test.jsonl.

    Args:
        opened: (model, tokenizer).
        predictor: a fitted predictor of this model; None: none.

    Returns:
        sums: {name: [S]} per sequence: nll and tokens of the completion; decoded tokens and requests;
        `loads POLICY C`, `hits POLICY C`, `own C` and `shared C` (`concentration.static_hits`).
        load_entropy: [L]; load: [L, E] share of the requests, largest first; judged: exact match and
        Rouge-L, where asked for.
    """
    scored = evaluate(opened, data, metrics="perplexity", per_row=True, progress=False)
    recorded = trace(opened, data, split="test", progress=False)
    sums = {name: scored["per_row"][name] for name in ("nll", "tokens")}
    for budget in what.budgets:
        fixed = static_hits(recorded, budget)
        sums |= {"requests": fixed["requests"], f"own {budget}": fixed["own"]}
        sums[f"shared {budget}"] = fixed["shared"]
    replays = simulate(recorded, what.policies, what.budgets, per_sequence=True)["results"]
    if predictor is not None:
        replays += [
            row | {"policy": PREDICTED} for row in _predicted(opened[0], recorded, what.budgets, predictor)
        ]
    for row in replays:
        of = f"{row['policy']} {row['slots']}"
        sums |= {f"loads {of}": row["per_sequence"]["loads"], f"hits {of}": row["per_sequence"]["hits"]}
        sums["decoded"] = row["per_sequence"]["tokens"]
    counts = recorded.request_counts(DECODE).sum(0)
    shares = np.sort(counts / np.maximum(counts.sum(1, keepdims=True), 1), axis=1)[:, ::-1]
    result: dict[str, Any] = {
        "sums": {name: np.asarray(values, np.float64).tolist() for name, values in sums.items()},
        "load_entropy": load_entropy(counts).tolist(),
        "load": np.round(shares, 5).tolist(),
    }
    if what.exact_rows:
        judged = evaluate(opened, data, limit=what.exact_rows, metrics="exact_match,rouge_l", progress=False)
        result["judged"] = {name: judged[name] for name in ("exact_match", "rouge_l", "num_rows")}
    return result


def fit(opened: Any, data: Path, rows: int, output: Path, seed: int) -> dict[str, Any]:
    """Fits a predictor to the routing of the first train rows; returns its report."""
    recorded = trace(opened, data, limit=rows, split="train", progress=False)
    return fit_predictor(opened, recorded, output, seed=seed)


def _predicted(model: Any, recorded: Trace, budgets: tuple[int, ...], path: Path) -> list[dict[str, Any]]:
    predictor = Predictor.load(path, model)
    scores = np.stack([predictor.scores(prompt) for prompt in recorded.prompts()])
    return simulate(
        recorded, "decay", budgets, predictor_scores=scores, strength=predictor.strength, per_sequence=True
    )["results"]


Sums = dict[str, np.ndarray]


def pooled(sums: list[dict[str, list[float]]]) -> Sums:
    """Per-sequence sums of several seeds, added; each seed has seen the same sequences."""
    return {name: np.sum([one[name] for one in sums], axis=0) for name in sums[0]}


def only(sums: Sums, chosen: list[bool]) -> Sums:
    """Some of the sequences."""
    return {name: values[np.asarray(chosen)] for name, values in sums.items()}


def summary(sums: Sums) -> dict[str, Any]:
    """Means of one set of weights (or of several seeds pooled).

    Returns:
        nll and perplexity of the completions; loads: per policy and budget loads_per_token and hit_rate;
        static: per budget the hits of the best fixed set of each sequence (own) and of all (shared).
    """
    nll = float(sums["nll"].sum() / sums["tokens"].sum())
    decoded, requests = sums["decoded"].sum(), sums["requests"].sum()
    loads = []
    for policy, slots in replayed(sums):
        read, hits = sums[f"loads {policy} {slots}"].sum(), sums[f"hits {policy} {slots}"].sum()
        loads.append(
            {
                "policy": policy,
                "slots": slots,
                "loads_per_token": float(read / max(1, decoded)),
                "hit_rate": float(hits / max(1, hits + read)),
            }
        )
    static = [
        {"slots": slots} | {name: float(sums[f"{name} {slots}"].sum() / max(1, requests)) for name in FIXED}
        for slots in sorted({slots for _, slots in replayed(sums)})
    ]
    return {
        "nll": nll,
        "perplexity": math.exp(min(nll, 700.0)),
        "num_sequences": len(sums["nll"]),
        "loads": loads,
        "static": static,
    }


FIXED = ("own", "shared")


def compare(tuned: Sums, control: Sums) -> dict[str, Any]:
    """Ratios tuned / control with 95 percent intervals, paired over the sequences.

    Returns:
        perplexity, nll: {ratio, low, high}; loads: the same per policy and budget.
    """
    return {
        "perplexity": perplexity_ratio(tuned["nll"], control["nll"], control["tokens"]),
        "nll": ratio_of_sums(tuned["nll"], control["nll"]),
        "loads": [
            {"policy": policy, "slots": slots}
            | ratio_of_sums(tuned[f"loads {policy} {slots}"], control[f"loads {policy} {slots}"])
            for policy, slots in replayed(tuned)
        ],
    }


def replayed(sums: Sums) -> list[tuple[str, int]]:
    """The policies and budgets that were replayed, in their order."""
    names = [name.removeprefix("loads ") for name in sums if name.startswith("loads ")]
    return [(policy, int(slots)) for policy, slots in (name.rsplit(" ", 1) for name in names)]
