"""A price on experts that every sequence asks for: against concentration on one set for all (not in the
paper).

Misses alone are cheapest when all sequences share the same experts; with a price on those each keeps to its
own.
"""

from __future__ import annotations

import torch


def load_price(
    requests_LNE: torch.Tensor, usage_LE: torch.Tensor, balance: float, top_k: int
) -> torch.Tensor:
    """What the asked experts cost more, or less, than the average one, per layer and scored token.

        price(e) = balance (E/K f(e) - 1), f the share of late tokens that asked for e, over all sequences

    Args:
        requests_LNE: [L, N, E] r(t) of N scored tokens (cache_loss.straight_through_requests).
        usage_LE: [L, E] f, no gradient; K where summed over E.
        balance: in misses per request of an expert that is asked twice as often as the average.
    """
    price_LE = balance * (usage_LE * requests_LNE.shape[-1] / top_k - 1)
    return (requests_LNE * price_LE[:, None]).sum(-1).mean()
