"""A predictor beside what costs nothing: in recall, in the loads of the default policy, and in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from melinoe.routing.policies import Strength
from melinoe.routing.simulate import simulate
from melinoe.routing.trace import Trace

MAX_REPLAYED = 200_000  # calls of one layer each: a comparison, which must not take longer than the fit


def recall(scores: torch.Tensor, frequencies: torch.Tensor, weights: torch.Tensor, slots: int) -> float:
    """The share of decoding's requests that the `slots` best-scored experts of each layer serve.

    Args:
        scores: [S, L, E] (or [L, E] for all).  frequencies: [S, L, E] requests per decoded token.
        weights: [S] decoded tokens.
    """
    best = scores.expand_as(frequencies).topk(min(slots, scores.shape[-1]), dim=-1).indices
    served = frequencies.gather(-1, best).sum(-1) / frequencies.sum(-1).clamp_min(1e-12)  # [S, L]
    return float((served.mean(1) * weights).sum() / weights.sum())


def decode_loads(
    trace: Trace, slots: int, scores: np.ndarray | None, strengths: list[Strength] | None
) -> float:
    """Decode loads per token of the default policy, on the first sequences of a trace.

    Args:
        scores: [S, L, E], or None for no prediction.
    """
    calls = np.bincount(trace.sequence, minlength=trace.num_sequences).cumsum() * trace.num_layers
    number = max(1, int((calls <= MAX_REPLAYED).sum()))
    some = trace.only(range(number))
    given = None if scores is None else scores[:number]
    replayed = simulate(
        some, "decay", slots, predictor_scores=given, strength=strengths and strengths[:number]
    )
    return float(replayed["results"][0]["loads_per_token"])


def warnings_of(report: dict[str, Any]) -> list[str]:
    """What the report means, where it is not what somebody who fits a predictor expects."""
    found = []
    if report["kept"] == "global":
        found.append(
            f"the network reads nothing out of prompts: {report['loads_predictor']:.3f} loads per token on"
            f" held-out rows, {report['loads_global']:.3f} with the global frequencies, which were kept"
        )
    best = min(report["loads_predictor"], report["loads_global"])
    if best >= report["loads_none"]:
        found.append(
            f"no prediction is as good: {report['loads_none']:.3f} loads per token without one,"
            f" {best:.3f} with it; generate without --predictor"
        )
    free = max(("global", "prefill"), key=lambda name: report[f"recall_{name}"])
    if report["recall_predictor"] <= report[f"recall_{free}"]:
        name = {"global": "the global frequencies", "prefill": "the routing of the prompt"}[free]
        found.append(
            f"as a fixed set {name} would serve more than the network: recall"
            f" {report[f'recall_{free}']:.3f} against {report['recall_predictor']:.3f}"
        )
    return found
