"""Tokens to rows sorted by expert, and the experts' outputs back to tokens; both with a backward pass of their own.

Shape suffixes: T tokens, K experts per token, N = T * K rows sorted by expert, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


class SortRows(torch.autograd.Function):
    """x [T, H] -> [N, H]: the row of every (token, choice), sorted by expert.

    The backward pass is one gathering sum over K, several times faster on a CPU than the scatter that
    autograd would use, and in a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, token_N: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_TK)
        return x_TH.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (place_TK,) = ctx.saved_tensors
        return F.embedding_bag(place_TK, grads[0].contiguous(), mode="sum"), None, None


class Combine(torch.autograd.Function):
    """y [N, H] sorted by expert, weights [T, K] -> sum_k w y [T, H], in top-k order."""

    @staticmethod
    def forward(
        ctx: Any, y_NH: torch.Tensor, weights_TK: torch.Tensor, token_N: torch.Tensor, place_TK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(y_NH, weights_TK, token_N, place_TK)
        weights = weights_TK.to(y_NH.dtype)
        return F.embedding_bag(place_TK, y_NH.contiguous(), mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        y_NH, weights_TK, token_N, place_TK = ctx.saved_tensors
        grad_NH = grads[0].index_select(0, token_N)
        grad_weights_TK = (y_NH * grad_NH).sum(-1)[place_TK].to(weights_TK.dtype)
        weight_N = torch.empty_like(grad_NH[:, 0])
        weight_N[place_TK.reshape(-1)] = weights_TK.reshape(-1).to(grad_NH.dtype)
        return grad_NH.mul_(weight_N[:, None]), grad_weights_TK, None, None
