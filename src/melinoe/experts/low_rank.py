"""Per-expert low-rank additions, computed inside the experts function: y = x W^T + (alpha/r) (x A^T) B^T.

PEFT's target_parameters gives the same numbers, but forms W + dW of every expert in every forward
pass, which is what a model that does not fit its memory cannot afford. Here the factors live in a small
submodule `low_rank` of the experts module, and two functions read them: `melinoe_experts`, which
goes expert by expert (`term`), and `tuning_experts`, used in training, for experts that are resident or paged
(backward.py).

Shape suffixes: T tokens, K experts per token, N = T * K routed rows (sorted by expert), H hidden,
I inner, E experts, R rank. Factors are A [E, R, in] and B [E, out, R], also for transposed experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from melinoe.experts.backward import field_shapes, is_paged, routed_experts
from melinoe.experts.row_order import Combine, Order, SortRows, weights_by_row

Projection = Literal["up", "down"]
EXPERTS_FUNCTION = "melinoe_tuning"


def projection_parameter(module: nn.Module, projection: Projection) -> str:
    """The experts module's own name of a projection: gate_up_proj or up_proj, and down_proj."""
    if projection == "down":
        return "down_proj"
    return "gate_up_proj" if module.has_gate else "up_proj"


class LowRankExperts(nn.Module):
    """The factors of all experts of one layer, float32; `B` starts at zero, so the model starts unchanged.

    Args:
        up, down: (in, out) of the two projections.
        rank, alpha: the addition is alpha / rank times the product.
        generator: for the random start of `A` (normal, scaled as nn.Linear's default is).
    """

    def __init__(
        self,
        num_experts: int,
        up: tuple[int, int],
        down: tuple[int, int],
        rank: int,
        alpha: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank

        def start(size_in: int) -> nn.Parameter:
            values = torch.randn(num_experts, rank, size_in, generator=generator) * (3 * size_in) ** -0.5
            return nn.Parameter(values.to(device))

        def zeros(size_out: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(num_experts, size_out, rank, device=device))

        self.up_A, self.up_B = start(up[0]), zeros(up[1])
        self.down_A, self.down_B = start(down[0]), zeros(down[1])

    def factors(self, projection: Projection) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [E, R, in], B [E, out, R])."""
        return (self.up_A, self.up_B) if projection == "up" else (self.down_A, self.down_B)

    def term(self, x_NI: torch.Tensor, expert: int, projection: Projection) -> torch.Tensor:
        """What one expert's factors add to its projection: [N, in] -> [N, out], in the dtype of `x_NI`."""
        a_ERI, b_EOR = self.factors(projection)
        inner_NR = F.linear(x_NI, a_ERI[expert].to(x_NI.dtype))
        return F.linear(inner_NR, b_EOR[expert].to(x_NI.dtype)) * self.scale


def projection_size(module: nn.Module, projection: Projection) -> tuple[int, int]:
    """(in, out) of a projection, of resident or paged experts."""
    name = projection_parameter(module, projection)
    shape = field_shapes(module)[name] if is_paged(module) else getattr(module, name).shape[1:]
    return (shape[0], shape[1]) if module.is_transposed else (shape[1], shape[0])


def attach_low_rank(
    module: nn.Module,
    rank: int,
    alpha: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> LowRankExperts:
    """Puts fresh factors on an experts module, resident or paged.

    device: where they are; None: where the module's weights are.
    """
    if device is None and not is_paged(module):
        device = module.down_proj.device
    up, down = projection_size(module, "up"), projection_size(module, "down")
    module.low_rank = LowRankExperts(module.num_experts, up, down, rank, alpha, generator, device)
    return module.low_rank


def _factors(module: nn.Module, projection: Projection, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(A, B) of an experts module; of rank 0 where it has none."""
    low_rank = getattr(module, "low_rank", None)
    if low_rank is not None:
        return low_rank.factors(projection)
    size_in, size_out = projection_size(module, projection)
    return like.new_zeros(module.num_experts, 0, size_in), like.new_zeros(module.num_experts, size_out, 0)


FOLD_ELEMENTS = 2**18  # of a weight that are summed at once


@torch.no_grad()
def fold_expert(
    weight: torch.Tensor, low_rank: LowRankExperts, projection: Projection, expert: int, transposed: bool
) -> None:
    """Adds one expert's factors to its weight in place, W += (alpha / r) B A, summed in float32.

    Some output rows at a time: a record may be hundreds of MiB, and float32 sums of all of it several
    records.
    """
    a_ERI, b_EOR = low_rank.factors(projection)
    a_RI, b_OR = a_ERI[expert].float(), b_EOR[expert].float()
    rows = max(1, FOLD_ELEMENTS // a_RI.shape[1])
    for start in range(0, len(b_OR), rows):
        added = (b_OR[start : start + rows] @ a_RI) * low_rank.scale
        part = weight[:, start : start + rows] if transposed else weight[start : start + rows]
        part.copy_(part.float() + (added.T if transposed else added).to(weight.device))


@torch.no_grad()
def fold_low_rank(module: nn.Module) -> None:
    """Adds the factors to the resident weights and removes them."""
    projections: tuple[Projection, ...] = ("up", "down")
    for projection in projections:
        weight = getattr(module, projection_parameter(module, projection))
        for expert in range(module.num_experts):  # one expert at a time: no second copy of a layer
            fold_expert(weight[expert], module.low_rank, projection, expert, module.is_transposed)
    del module.low_rank


def _scale(module: nn.Module) -> float:
    low_rank = getattr(module, "low_rank", None)
    return 1.0 if low_rank is None else low_rank.scale


def tuning_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts function for training: [T, H], [T, K], [T, K] -> [T, H].

    Gradient flows to the hidden states, the factors and the weights; the experts' own weights stay
    frozen. Expert-parallel sentinels (index >= E) contribute nothing.
    """
    return experts_in_order(module, hidden_states, top_k_weights, Order.of(top_k_index, module.num_experts))


def experts_in_order(
    module: nn.Module, hidden_states: torch.Tensor, top_k_weights: torch.Tensor, order: Order
) -> torch.Tensor:
    """As `tuning_experts`, the rows sorted by expert already."""
    names = projection_parameter(module, "up"), projection_parameter(module, "down")
    factors = (*_factors(module, "up", hidden_states), *_factors(module, "down", hidden_states))

    def routed(x: torch.Tensor, weights: torch.Tensor, rows: Order) -> torch.Tensor:
        return routed_experts(module, x, weights, rows, names, factors, _scale(module))

    scales_input = getattr(module, "weights_scale_input", False)  # llama4
    if not scales_input and not module.has_post_expert_norm:
        return routed(hidden_states, top_k_weights, order).to(hidden_states.dtype)
    # what stands between a token and its expert, or an expert and the sum, needs a row for every choice
    x_NH = SortRows.apply(hidden_states, order.token_N, order.place_TK)
    if scales_input:
        x_NH = x_NH * weights_by_row(top_k_weights, order.place_TK)[:, None].to(x_NH.dtype)
        top_k_weights = torch.ones_like(top_k_weights)
    y_NH = routed(x_NH, x_NH.new_ones(len(x_NH), 1), order.of_rows())
    if module.has_post_expert_norm:
        y_NH = module.post_expert_norm(y_NH)
        absent_N = torch.arange(len(y_NH), device=y_NH.device) >= order.ends[-1]
        y_NH = y_NH.masked_fill(absent_N[:, None], 0.0)
    return Combine.apply(y_NH, top_k_weights, order.token_N, order.place_TK).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, tuning_experts)
