"""What keeps the router near the base's: the rank matching loss (Eq. 5, 12), and a rival's divergence.

Rank matching keeps the order in which the base router ranked the experts.
Without it the cheapest way to few misses is to send every token to the same experts. Written as an
autograd function, because the plain form keeps a [tokens, E, E] tensor for the backward pass, and the
gradient needs only how often each expert stands on either side of an active pair.
"""

from __future__ import annotations

from typing import Any

import torch

PAIR_ELEMENTS = 1 << 22  # entries of one [tokens, E, E] comparison; bounds the work space


class _ActivePairs(torch.autograd.Function):
    """[T, E] -> [T] the sum over active pairs; saves an integer [T, E]."""

    @staticmethod
    def forward(ctx: Any, tuned_TE: torch.Tensor, base_TE: torch.Tensor, margin: float) -> torch.Tensor:
        num_tokens, num_experts = tuned_TE.shape
        chunk = max(1, PAIR_ELEMENTS // (num_experts * num_experts))
        counts_TE = torch.empty(num_tokens, num_experts, dtype=torch.int32, device=tuned_TE.device)
        active_T = torch.empty(num_tokens, dtype=torch.int32, device=tuned_TE.device)
        for start in range(0, num_tokens, chunk):
            tuned, base = tuned_TE[start : start + chunk], base_TE[start : start + chunk]
            pairs = base[:, :, None] > base[:, None, :]  # i stands before j; a tie stands nowhere
            pairs &= tuned[:, :, None] - tuned[:, None, :] < margin
            before = pairs.sum(2, dtype=torch.int32)
            counts_TE[start : start + chunk] = pairs.sum(1, dtype=torch.int32) - before
            active_T[start : start + chunk] = before.sum(1, dtype=torch.int32)
        ctx.save_for_backward(counts_TE)
        return margin * active_T + (counts_TE * tuned_TE).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (counts_TE,) = ctx.saved_tensors
        return counts_TE * grads[0][:, None], None, None


def rank_matching(
    tuned_TE: torch.Tensor, base_TE: torch.Tensor, rho: float = 0.1, per_expert: bool = False
) -> torch.Tensor:
    """L_rm = mean_t sum_{i,j} 1{p_b,i > p_b,j} relu(rho - (p_f,i - p_f,j)) (Eq. 5, 12).

    Not zero for an untouched router, and it grows with the square of E: a weight does not carry over
    between models of different E. (As a mean over the E (E - 1) / 2 pairs it would be the same loss with
    another weight.)

    Args:
        tuned_TE: [..., E] p_f, with gradient.
        base_TE: [..., E] p_b of the frozen router, no gradient.
        rho: the margin by which the order is to hold.
        per_expert: the margin is rho * 8 / E instead of rho, in proportion to the size of a probability
            (8 experts: the paper's own margin at its smallest E).

    Returns:
        A float32 scalar, 0 for no tokens.
    """
    num_experts = tuned_TE.shape[-1]
    tuned = tuned_TE.reshape(-1, num_experts)
    if not tuned.is_floating_point() or tuned.dtype in (torch.bfloat16, torch.float16):
        tuned = tuned.float()
    base = base_TE.detach().reshape(-1, num_experts).to(tuned.dtype)
    if len(tuned) == 0:
        return tuned.sum()
    return _ActivePairs.apply(tuned, base, rho * 8 / num_experts if per_expert else rho).mean()


def router_divergence(tuned_TE: torch.Tensor, base_TE: torch.Tensor) -> torch.Tensor:
    """KL(p_b, p_f), nats, mean over tokens: what ReMoE (arXiv 2605.27081) has in the place of rank matching.

    Args:
        tuned_TE: [T, E] p_f, with gradient.
        base_TE: [T, E] p_b of the frozen router, no gradient.
    """
    log_ratio_TE = base_TE.clamp_min(1e-20).log() - tuned_TE.clamp_min(1e-20).log()
    return (base_TE * log_ratio_TE).sum(-1).mean()
