"""The quality term: the data's next token, the base model's own prediction of it, or some of both.

Asking for the base model's distribution (distillation) says of every token what the data says of one sample:
less noise in the gradient, so more room for the cache's.

Shape suffixes: B sequences, S positions, N chosen positions of all of them in order, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

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
    """`likelihood` without [N, V]: logits and their gradient are there for a few tokens at a time.

    It differs in the order of summation, and each sum's gradient by hidden_NH is rounded to its dtype.

    Args:
        to_logits: [n, H] -> [n, V] the output layer; it must be frozen.
        hidden_NH: [N, H] what it is given, with gradient.
        base_hidden_NH: [N, H] likewise of the base model, no gradient; None: not compared.
        at_once: tokens of a piece.
    """

    def piece(here: slice, hidden_NH: torch.Tensor) -> Likelihood:
        base_NV = None
        if base_hidden_NH is not None:
            with torch.no_grad():
                base_NV = to_logits(base_hidden_NH[here]).float()
        return likelihood(to_logits(hidden_NH).float(), next_tokens_N[here], is_completion_N[here], base_NV)

    compared = base_hidden_NH is not None
    nll, divergence, base_nll = _Pieces.apply(hidden_NH, piece, at_once, compared)
    found = Likelihood(nll, int(is_completion_N.sum()))
    if compared:
        found.divergence, found.divergence_tokens, found.base_nll = divergence, len(hidden_NH), base_nll
    return found


class _Pieces(torch.autograd.Function):
    """The sums of all pieces: (nll, divergence, base_nll). A piece's gradients are computed with it and kept,
    [N, H] for each of the two sums, so that no logits are computed twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, piece: Callable[..., Likelihood], at_once: int, compared: bool
    ) -> tuple[torch.Tensor, ...]:
        nll, divergence, base_nll = hidden_NH.new_zeros(3, dtype=torch.float32).unbind()
        wanted = ctx.needs_input_grad[0]
        gradients = [torch.empty_like(hidden_NH) for _ in range(1 + compared)] if wanted else []
        for start in range(0, len(hidden_NH), at_once):
            here = slice(start, start + at_once)
            part = hidden_NH[here].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                one = piece(here, part)
            sums = [one.nll] if one.divergence is None else [one.nll, one.divergence]
            for number, gradient in enumerate(gradients):
                last = number + 1 == len(gradients)
                (gradient[here],) = torch.autograd.grad(sums[number], part, retain_graph=not last)
            nll = nll + one.nll.detach()
            if one.divergence is not None and one.base_nll is not None:
                divergence, base_nll = divergence + one.divergence.detach(), base_nll + one.base_nll
            del one, sums  # else the next piece's logits come beside these
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(base_nll)
        return nll, divergence, base_nll

    @staticmethod
    def backward(ctx: Any, *by_sum: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total = sum(one * gradient for one, gradient in zip(by_sum, ctx.saved_tensors))
        return total, None, None, None


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
