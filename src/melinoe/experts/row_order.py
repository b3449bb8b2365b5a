"""Tokens to rows sorted by expert, and the experts' outputs back to tokens.

Both have a backward pass of their own.

Shape suffixes: T tokens, K experts per token, N = T * K rows sorted by expert, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Order:
    """Which row of N stands for which choice of a token; the one place where rows are grouped by expert.

    choice_N: the choice of each row, its place in the flat list [T * K]. ends: for every expert the row
    behind its last; rows behind the last expert's belong to none (expert-parallel sentinels) and give
    nothing.
    """

    choice_N: torch.Tensor
    num_choices: int
    ends: list[int]

    @classmethod
    def of(cls, top_k_index: torch.Tensor, num_experts: int, indices: np.ndarray | None = None) -> Order:
        """The order of the router's choice [T, K].

        indices: the same choice on the host, where the caller has it already.
        """
        expert_N, choice_N = torch.sort(top_k_index.reshape(-1), stable=True)  # where it is: no upload
        if indices is None:
            counts = torch.bincount(expert_N, minlength=num_experts)[:num_experts]
            ends = counts.cumsum(0).tolist()  # the one synchronisation of a layer
        else:
            ends = np.bincount(indices.ravel(), minlength=num_experts)[:num_experts].cumsum().tolist()
        return cls(choice_N, top_k_index.shape[1], ends)

    @cached_property
    def rows(self) -> dict[int, slice]:
        """The rows of every expert that has any."""
        starts = [0, *self.ends[:-1]]
        pairs = enumerate(zip(starts, self.ends, strict=True))
        return {expert: slice(start, end) for expert, (start, end) in pairs if end > start}

    @cached_property
    def token_N(self) -> torch.Tensor:
        """The token of each row."""
        return self.choice_N.div(self.num_choices, rounding_mode="floor")

    @cached_property
    def place_TK(self) -> torch.Tensor:
        """The row of each choice."""
        place_TK = torch.empty_like(self.choice_N)
        place_TK[self.choice_N] = torch.arange(len(place_TK), device=place_TK.device)
        return place_TK.view(-1, self.num_choices)

    def of_rows(self) -> Order:
        """The function on rows that are in this order already, each its own token: [N, H] -> [N, H]."""
        return Order(torch.arange(len(self.choice_N), device=self.choice_N.device), 1, self.ends)


def weights_by_row(weights_TK: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    """[N] the routing weight of every row, differentiable."""
    flat_N = weights_TK.reshape(-1)
    return torch.empty_like(flat_N).scatter(0, place_TK.reshape(-1), flat_N)


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
        weight_N = weights_by_row(weights_TK, place_TK).to(grad_NH.dtype)
        return grad_NH.mul_(weight_N[:, None]), grad_weights_TK, None, None
