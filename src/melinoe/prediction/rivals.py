"""What a predictor has to beat: scores that cost nothing, or next to nothing.

Each is [S, L, E] requests per decoded token for every sequence of a trace, as `Predictor.scores` gives them:
global (how often the rows that others were fitted to ask), nearest (the rows whose prompts are most alike),
prefill (the routing of the prompt itself). Two more need a network: the predictor, and predictor + prefill,
which is what the default policy makes of a prediction. And oracle is the bound: the sequence's own requests.
"""

from __future__ import annotations

import numpy as np
import torch

from melinoe.routing.policies import DECODE, PREFILL
from melinoe.routing.trace import Trace

NEIGHBOURS = 10


def decoded_lengths(trace: Trace) -> np.ndarray:
    """[S] decoded tokens of each sequence."""
    return np.bincount(trace.sequence[trace.decoded], minlength=trace.num_sequences)


def overall(trace: Trace) -> np.ndarray:
    """[L, E] requests per decoded token of all sequences together."""
    return trace.request_counts(DECODE).sum(0) / max(1, int(trace.decoded.sum()))


def nearest(known: torch.Tensor, asked: torch.Tensor, frequencies: np.ndarray) -> np.ndarray:
    """[S, L, E]: the mean over the ten known prompts that are most like each one.

    Args:
        known: [R, F] features of the prompts whose routing is known (`features.prompt_features`).
        asked: [S, F] of those that are asked about.
        frequencies: [R, L, E] requests per decoded token of the known ones.
    """
    mean, deviation = known.mean(0), known.std(0, correction=0) + 1e-3
    likeness = _directions((asked - mean) / deviation) @ _directions((known - mean) / deviation).T
    best = likeness.topk(min(NEIGHBOURS, len(known)), dim=1).indices
    return np.stack([frequencies[one].mean(0) for one in best.numpy()])


def _directions(points: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(points, dim=1)


def with_prefill(scores: np.ndarray, trace: Trace, tokens: float) -> np.ndarray:
    """[S, L, E]: scores that count as that many tokens, together with the tokens of the prompt."""
    counts = trace.request_counts(PREFILL)
    lengths = np.maximum(trace.prompt_lengths, 0)[:, None, None]
    return (tokens * scores + counts) / (tokens + lengths)
