"""The quality term: the data's next token, the base model's own prediction of it, or some of both.

Asking for the base model's distribution (distillation) says of every token what the data says of one sample:
less noise in the gradient, so more room for the cache's.

Shape suffixes: B sequences, S positions, N chosen positions of all of them in order, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

PIECE_BYTES = 2**26  # of float32 logits that are there at a time, and each of their like


def next_token_positions(
    mask_BS: torch.Tensor, answers_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, S] positions that predict a real token, [B, S] those that predict a completion token).

    These are not cache_loss.scored_positions, though they look alike: a likelihood counts the position that
    predicts the first completion token, which is the prompt's last, while the loads of decoding begin when
    that token is fed.

    Args:
        mask_BS: [B, S] 1 for real tokens.
        answers_BS: [B, S] bool, the completion tokens.
    """
    mask_BS = mask_BS.bool()
    follows_BS = mask_BS & mask_BS.roll(-1, 1)
    follows_BS[:, -1] = False
    return follows_BS, follows_BS & answers_BS.roll(-1, 1)


@dataclass
class Likelihood:
    """nll: sum of the negative log-likelihood over completion tokens; tokens: their number.

    divergence: sum of KL(base, tuned) over `divergence_tokens` predicted tokens, where it was asked for;
    base_nll: the base's own sum over completion tokens, likewise.
    """

    nll: torch.Tensor
    tokens: int
    divergence: torch.Tensor | None = None
    divergence_tokens: int = 0
    base_nll: torch.Tensor | None = None


def likelihood(
    logits_NV: torch.Tensor,
    next_tokens_N: torch.Tensor,
    is_completion_N: torch.Tensor,
    base_logits_NV: torch.Tensor | None = None,
) -> Likelihood:
    """The likelihood of the completion tokens, and how far all predictions are from the base model's.

    Args:
        logits_NV: [N, V] float32, with gradient.
        next_tokens_N: [N] the token that the data have there.
        is_completion_N: [N] bool.
        base_logits_NV: [N, V] float32 of the base model on the same positions, no gradient; None: not
            compared.
    """
    targets = next_tokens_N[is_completion_N]
    nll = F.cross_entropy(logits_NV[is_completion_N], targets, reduction="sum")
    found = Likelihood(nll, len(targets))
    if base_logits_NV is not None:
        base_NV = base_logits_NV.log_softmax(-1)
        found.divergence = F.kl_div(logits_NV.log_softmax(-1), base_NV, reduction="sum", log_target=True)
        found.divergence_tokens = len(base_NV)
        found.base_nll = F.nll_loss(base_NV[is_completion_N], targets, reduction="sum")
    return found


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens' logits are computed together."""
    return max(1, PIECE_BYTES // (4 * vocabulary))


def likelihood_in_pieces(
    to_logits: Callable[[torch.Tensor], torch.Tensor],
    hidden_NH: torch.Tensor,
    next_tokens_N: torch.Tensor,
    is_completion_N: torch.Tensor,
    base_hidden_NH: torch.Tensor | None,
    at_once: int,
) -> Likelihood:
    """`likelihood` without [N, V]: logits of a few tokens at a time, and once more in the backward pass.

    It differs in the order of summation alone.

    Args:
        to_logits: [n, H] -> [n, V] the output layer, frozen.
        hidden_NH: [N, H] what it is given, with gradient.
        base_hidden_NH: [N, H] likewise of the base model, no gradient; None: not compared.
        at_once: tokens of a piece.
    """

    def piece(
        hidden_NH: torch.Tensor, base_NH: torch.Tensor | None, tokens_N: torch.Tensor, kept_N: torch.Tensor
    ) -> Likelihood:
        with torch.no_grad():
            base_NV = to_logits(base_NH).float() if base_NH is not None else None
        return likelihood(to_logits(hidden_NH).float(), tokens_N, kept_N, base_NV)

    total = Likelihood(hidden_NH.float().sum() * 0, 0)  # without a token: nothing, but with a gradient
    if base_hidden_NH is not None:
        total.divergence, total.base_nll = total.nll, total.nll.detach()
    for start in range(0, len(hidden_NH), at_once):
        here = slice(start, start + at_once)
        base_NH = None if base_hidden_NH is None else base_hidden_NH[here]
        given = hidden_NH[here], base_NH, next_tokens_N[here], is_completion_N[here]
        one: Likelihood = checkpoint(piece, *given, use_reentrant=False, preserve_rng_state=False)
        total.nll, total.tokens = total.nll + one.nll, total.tokens + one.tokens
        if one.divergence is not None and one.base_nll is not None:
            total.divergence, total.base_nll = (
                total.divergence + one.divergence,
                total.base_nll + one.base_nll,
            )
            total.divergence_tokens += one.divergence_tokens
    return total


def sequence_nll(logits_NV: torch.Tensor, ids_BS: torch.Tensor, completion_BS: torch.Tensor) -> torch.Tensor:
    """[B] float64: negative log-likelihood of each row's completion, nats, summed over its tokens.

    Args:
        logits_NV: [N, V] at the positions that predict a completion token.
        completion_BS: those positions (next_token_positions).
    """
    targets_N = ids_BS.roll(-1, 1)[completion_BS]
    sizes = completion_BS.sum(1).tolist()
    rows = zip(logits_NV.split(sizes), targets_N.split(sizes), strict=True)
    return torch.stack([F.cross_entropy(*row, reduction="sum") for row in rows]).double()
