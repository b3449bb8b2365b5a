"""How a model spreads its requests: over the experts as a whole, and within each sequence.

Fewer loads can come from two things. Each sequence may keep to few experts, others than the next
sequence's: that is what tuning is for. Or all sequences may ask the same few: a collapse, which a fixed
set would serve as well. These numbers tell them apart.
"""

from __future__ import annotations

import numpy as np

from melinoe.routing.calls import DECODE
from melinoe.routing.trace import Trace


def load_entropy(counts: np.ndarray) -> np.ndarray:
    """[L] entropy of the load over the experts of each layer, as a share of its maximum log E.

    1 is perfect balance; 0 is one expert for everything. A layer that was not asked has 0.

    Args:
        counts: [L, E] requests, as `Trace.request_counts(DECODE).sum(0)`.
    """
    counts = np.asarray(counts, np.float64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-12)
    nats = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(1)
    return nats / np.log(counts.shape[1])


def load_by_rank(counts: np.ndarray) -> np.ndarray:
    """[L, E] the share of each layer's requests that went to each expert, largest first.

    Args:
        counts: [L, E] requests.
    """
    counts = np.asarray(counts)
    return np.sort(counts / np.maximum(counts.sum(1, keepdims=True), 1), axis=1)[:, ::-1]


def static_hits(trace: Trace, slots: int) -> dict[str, np.ndarray]:
    """Decode requests that fixed sets of `slots` experts per layer would have served.

    Both sets are chosen with hindsight, so both are bounds. What `own` has over `shared` is what belongs
    to the sequence; where tuning raises both alike, routing has become more global.

    Returns:
        own: [S] hits of the best set of that very sequence; shared: [S] hits of the one best set for all
        sequences; requests: [S]. Summed over layers.
    """
    counts = trace.request_counts(DECODE).astype(np.float64)  # [S, L, E]
    slots = min(slots, trace.num_experts)
    own = np.sort(counts, axis=-1)[..., trace.num_experts - slots :].sum((1, 2))
    best = np.argsort(-counts.sum(0), axis=-1, kind="stable")[:, :slots]  # [L, C]
    shared = np.take_along_axis(counts, best[None], axis=-1).sum((1, 2))
    return {"own": own, "shared": shared, "requests": counts.sum((1, 2))}
