"""Ratios between two models on the same sequences, with intervals: bootstrap over sequences, in pairs.

What is compared are sums per sequence: loads of a replay, nats of a completion, matches. Both sides are
resampled together, so that what differs between sequences (their length, their topic) cancels and the
interval is that of the difference between the models.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from melinoe.errors import MelinoeError

NUM_BOOTSTRAP = 2000
QUANTILES = (0.025, 0.975)  # a 95 percent interval


@lru_cache(maxsize=2)
def resamplings(number: int, num_bootstrap: int = NUM_BOOTSTRAP, seed: int = 0) -> np.ndarray:
    """[B, S] float64: how often each of `number` sequences is drawn in each resampling."""
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(number, np.full(number, 1 / number), size=num_bootstrap)
    return draws.astype(np.float64)


def ratio_of_sums(
    a: np.ndarray, b: np.ndarray, num_bootstrap: int = NUM_BOOTSTRAP, seed: int = 0
) -> dict[str, float]:
    """sum(a) / sum(b) with its interval.

    Args:
        a, b: [S] totals of the same sequences in the same order.

    Returns:
        ratio, and low and high: the 95 percent interval of it.
    """
    a, b = _pair(a, b)
    picks = resamplings(len(a), num_bootstrap, seed)
    low, high = np.quantile((picks @ a) / np.maximum(picks @ b, 1e-12), QUANTILES)
    return {"ratio": float(a.sum() / max(b.sum(), 1e-12)), "low": float(low), "high": float(high)}


def perplexity_ratio(
    nll_a: np.ndarray,
    nll_b: np.ndarray,
    tokens: np.ndarray,
    num_bootstrap: int = NUM_BOOTSTRAP,
    seed: int = 0,
) -> dict[str, float]:
    """Perplexity of a over that of b: exp of the difference of their mean NLL per token.

    Args:
        nll_a, nll_b: [S] nats of each completion, summed over its tokens.
        tokens: [S] tokens of each completion, the same for both.

    Returns:
        ratio, low and high, as `ratio_of_sums`.
    """
    nll_a, nll_b = _pair(nll_a, nll_b)
    difference, tokens = _pair(nll_a - nll_b, tokens)
    picks = resamplings(len(tokens), num_bootstrap, seed)
    ratios = np.exp((picks @ difference) / np.maximum(picks @ tokens, 1e-12))
    low, high = np.quantile(ratios, QUANTILES)
    return {"ratio": float(np.exp(difference.sum() / tokens.sum())), "low": float(low), "high": float(high)}


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise MelinoeError("the two sides are not the same sequences", got=f"{a.shape} and {b.shape}")
    return a, b
