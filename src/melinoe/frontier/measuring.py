"""Quality and locality of one set of weights on held-out rows: the same rows for all, teacher-forced.

Everything that a paired comparison needs is kept per sequence (sums.py). Loads are those of the very policies
that run on the device, each sequence from empty slots.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.config import DEFAULT_POLICY
from melinoe.errors import MelinoeError
from melinoe.frontier.sums import FixedSets, Replay, Sums
from melinoe.measure.quality import evaluate
from melinoe.measure.trace import trace
from melinoe.prediction.fit import Predictor, fit_predictor
from melinoe.routing.concentration import load_by_rank, load_entropy, static_hits
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
                "sweep: unknown policies",
                got=list(self.policies),
                allowed=", ".join([*sorted(POLICIES), *BOUNDS]),
            )
        for name in ("exact_rows", "predictor_rows"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise MelinoeError(f"sweep: {name} is too small", got=value, allowed="0 or more rows")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(opened: Any, data: Path, what: Measuring, predictor: Path | None = None) -> dict[str, Any]:
    """Measures on data/test.jsonl.

    Args:
        opened: (model, tokenizer).
        predictor: a fitted predictor of this model; None: none.

    Returns:
        sums: `Sums.to_json`; load_entropy: [L]; load: [L, E] share of the requests, largest first; judged:
        exact match and Rouge-L, where asked for.
    """
    scored = evaluate(opened, data, metrics="perplexity", per_row=True, progress=False)
    recorded = trace(opened, data, split="test", progress=False)
    fixed = {budget: static_hits(recorded, budget) for budget in what.budgets}
    replays = simulate(recorded, what.policies, what.budgets, per_sequence=True)["results"]
    if predictor is not None:
        replays += [
            row | {"policy": PREDICTED} for row in _predicted(opened[0], recorded, what.budgets, predictor)
        ]
    sums = Sums(
        nll=scored["per_row"]["nll"],
        tokens=scored["per_row"]["tokens"],
        decoded=replays[0]["per_sequence"]["tokens"],
        requests=fixed[what.budgets[0]]["requests"],
        replays=tuple(
            Replay(row["policy"], row["slots"], row["per_sequence"]["loads"], row["per_sequence"]["hits"])
            for row in replays
        ),
        fixed_sets=tuple(FixedSets(slots, sets["own"], sets["shared"]) for slots, sets in fixed.items()),
    )
    counts = recorded.request_counts(DECODE).sum(0)
    result: dict[str, Any] = {
        "sums": sums.to_json(),
        "load_entropy": load_entropy(counts).tolist(),
        "load": np.round(load_by_rank(counts), 5).tolist(),
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
    scores, strengths = predictor.predict_all(recorded.prompts())
    return simulate(
        recorded, "decay", budgets, predictor_scores=scores, strength=strengths, per_sequence=True
    )["results"]
