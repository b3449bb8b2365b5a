"""The quality term: the data's next token, the base model's own prediction of it, or some of both.

Asking for the base model's distribution (distillation) says of every token what the data says of one sample:
less noise in the gradient, so more room for the cache's.

Shape suffixes: B sequences, S positions, N chosen positions of all of them in order, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F


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
