"""A layer's routed experts as one differentiable function: what `tuning_experts` computes with.

The experts' own weights are frozen, and come one expert after the other from where they are: the module's
parameters, or the pager's slots. A slot is overwritten as soon as its expert has been served, so nothing of
it may wait for the backward pass: that asks the pager again, and every expert is read at most once per pass.

What is kept per routed row are the up projection's output and x A^T of both projections. The rows that went
in are gathered again from the hidden states, which most routers keep anyway, and the gate is computed again.
The experts' outputs are not kept either: the gradient of a routing weight, <g, y>, is <g W + scale (g B) A,
act> + <g, bias>, and its first factor is what the backward pass needs for the gate in any case.

Each pass over paged experts begins with those that the pass before has left in the slots, so of E experts in
C slots a step reads 2 (E - C) per layer, and 3 (E - C) with gradient checkpointing. The policy sees each pass
as a prompt of one token that asks for all experts of the batch, padding included; the statistics count it as
training, apart from prefill and decoding. Products and sums are the same for resident and paged experts, in
the same order; paged weights of another dtype are converted to that of the rows at each use.

Shape suffixes: T tokens, K experts per token, N = T * K routed rows sorted by expert, H hidden, I inner (what
the up projection gives), E experts, R rank, O and I of a weight its outputs and inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from melinoe.experts.row_order import Order, weights_by_row
from melinoe.paging.pager import Views
from melinoe.routing.policies import PREFILL, Call


def training_call(experts: list[int]) -> Call:
    """What the policy sees of one pass: every expert that has rows, asked for once."""
    return Call(np.array([experts], np.int64), np.zeros(1, np.int64), np.ones(1, bool), PREFILL)


def is_paged(module: nn.Module) -> bool:
    return getattr(module, "melinoe_paged", None) is not None


def field_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of one expert's tensors, by name, of a module whose experts are paged."""
    pager: Any = module.melinoe_paged.pager  # type: ignore[union-attr]
    return pager.weight_shapes(int(module.melinoe_layer))  # type: ignore[arg-type]


class _Experts:
    """One layer's experts as a pass needs them: rows and weights of one after the other.

    Holds no tensor of the batch: this waits for the backward pass beside what autograd keeps or, with
    gradient checkpointing, drops.
    """

    def __init__(self, module: Any, names: tuple[str, str], order: Order, scale: float) -> None:
        self.module, self.names, self.scale = module, names, scale
        self.rows, self.end = order.rows, order.ends[-1]

    def weights(self) -> contextlib.closing[Generator[tuple[int, Views]]]:
        """Yields (expert, its tensors); to be closed by the caller, who must not keep a tensor."""
        if not is_paged(self.module):
            return contextlib.closing(self._resident())
        pager, layer = self.module.melinoe_paged.pager, int(self.module.melinoe_layer)
        return contextlib.closing(pager.serve(layer, training_call(list(self.rows)), training=True))

    def _resident(self) -> Generator[tuple[int, Views]]:
        names = [*self.names, *(f"{name}_bias" for name in self.names if self.module.has_bias)]
        tensors = {name: getattr(self.module, name).detach() for name in names}
        for expert in self.rows:
            yield expert, {name: tensor[expert] for name, tensor in tensors.items()}

    def weight_OI(self, views: Views, side: int, dtype: torch.dtype) -> torch.Tensor:
        """A projection's weight in the dtype of the rows; it holds until the next one is asked for."""
        weight = views[self.names[side]]
        if weight.dtype != dtype:
            # always into the same memory: fresh pages for every expert cost more than converting
            buffers = self.module.melinoe_paged.converted
            key = (*weight.shape, dtype, weight.device)
            if key not in buffers:
                buffers[key] = torch.empty_like(weight, dtype=dtype)
            weight = buffers[key].copy_(weight)
        return weight.T if self.module.is_transposed else weight

    def bias_O(self, views: Views, side: int, dtype: torch.dtype) -> torch.Tensor | None:
        return views[f"{self.names[side]}_bias"].to(dtype) if self.module.has_bias else None

    def project(
        self, x: torch.Tensor, views: Views, side: int, a_RI: torch.Tensor, b_OR: torch.Tensor,
        out: torch.Tensor, inner_NR: torch.Tensor,
    ) -> None:  # fmt: skip
        """out = x W^T + scale (x A^T) B^T + bias; `inner_NR` = x A^T."""
        torch.mm(x, self.weight_OI(views, side, x.dtype).T, out=out)
        torch.mm(x, a_RI.T.to(x.dtype), out=inner_NR)
        out.addmm_(inner_NR, b_OR.T.to(x.dtype), alpha=self.scale)
        if (bias := self.bias_O(views, side, x.dtype)) is not None:
            out.add_(bias)

    def back(
        self,
        g: torch.Tensor,
        views: Views,
        side: int,
        a_RI: torch.Tensor,
        g_inner: torch.Tensor,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """out = g W + g_inner A, the gradient of a projection's input."""
        torch.mm(g, self.weight_OI(views, side, g.dtype), out=out)
        out.addmm_(g_inner, a_RI.to(g.dtype))

    def gate(self, up: torch.Tensor) -> torch.Tensor:
        return self.module._apply_gate(up) if self.module.has_gate else self.module.act_fn(up)


class _RoutedExperts(torch.autograd.Function):
    """x [T, H], routing weights [T, K] -> [T, H]: each token through its experts, added up in top-k order."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        up_a_ERI: torch.Tensor,
        up_b_EOR: torch.Tensor,
        down_a_ERI: torch.Tensor,
        down_b_EOR: torch.Tensor,
        token_N: torch.Tensor,
        place_TK: torch.Tensor,
        experts: _Experts,
    ) -> torch.Tensor:
        count, rank = len(token_N), up_a_ERI.shape[1]
        up_NI = x_TH.new_empty(count, up_b_EOR.shape[1])
        inner_up_NR, inner_down_NR = x_TH.new_empty(count, rank), x_TH.new_empty(count, rank)
        y_NH = x_TH.new_empty(count, down_b_EOR.shape[1])
        with experts.weights() as weights:
            for expert, views in weights:
                rows = experts.rows[expert]
                x, up = x_TH.index_select(0, token_N[rows]), up_NI[rows]
                experts.project(x, views, 0, up_a_ERI[expert], up_b_EOR[expert], up, inner_up_NR[rows])
                act, y, inner = experts.gate(up), y_NH[rows], inner_down_NR[rows]
                experts.project(act, views, 1, down_a_ERI[expert], down_b_EOR[expert], y, inner)
        y_NH[experts.end :].zero_()
        ctx.save_for_backward(
            x_TH, weights_TK, up_NI, inner_up_NR, inner_down_NR, token_N, place_TK,
            up_a_ERI, up_b_EOR, down_a_ERI, down_b_EOR,
        )  # fmt: skip
        ctx.experts = experts
        weights_TK = weights_TK.to(y_NH.dtype)
        return F.embedding_bag(place_TK, y_NH, mode="sum", per_sample_weights=weights_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        experts: _Experts = ctx.experts
        # before the pager is asked: with checkpointing this computes the layer again, which asks it as well
        x_TH, weights_TK, up_NI, inner_up_NR, inner_down_NR, token_N, place_TK, *factors = ctx.saved_tensors
        up_a_ERI, up_b_EOR, down_a_ERI, down_b_EOR = factors
        grad_TH = grad_out.contiguous()
        weight_N = weights_by_row(weights_TK, place_TK).to(grad_TH.dtype)
        grad_weight_N = torch.zeros(len(token_N), dtype=torch.float32, device=grad_TH.device)
        grad_x_NH = grad_TH.new_zeros(len(token_N), x_TH.shape[1]) if ctx.needs_input_grad[0] else None
        grads = [torch.zeros_like(factor) for factor in factors] if any(ctx.needs_input_grad[2:6]) else None

        with experts.weights() as weights:
            for expert, views in weights:
                rows = experts.rows[expert]
                g, weight_n1 = grad_TH.index_select(0, token_N[rows]), weight_N[rows, None]
                with torch.enable_grad():
                    up = up_NI[rows].detach().requires_grad_()
                    act = experts.gate(up)
                # of the expert's output before its routing weight, which then multiplies whatever is smaller
                g_inner = torch.mm(g, down_b_EOR[expert].to(g.dtype)).mul_(experts.scale)
                g_act = torch.empty_like(act)
                experts.back(g, views, 1, down_a_ERI[expert], g_inner, g_act)
                products = (g_act * act.detach()).sum(-1, dtype=torch.float32)
                if (bias := experts.bias_O(views, 1, g.dtype)) is not None:
                    products += torch.mv(g, bias)
                grad_weight_N[rows] = products
                (g_up,) = torch.autograd.grad(act, up, g_act.mul_(weight_n1))
                g_inner_up = torch.mm(g_up, up_b_EOR[expert].to(g.dtype)).mul_(experts.scale)
                if grads is not None:
                    x = x_TH.index_select(0, token_N[rows])
                    grads[0][expert] = torch.mm(g_inner_up.T, x)
                    grads[1][expert] = torch.mm(g_up.T, inner_up_NR[rows]).mul_(experts.scale)
                    grads[2][expert] = torch.mm(g_inner.mul_(weight_n1).T, act.detach())
                    grads[3][expert] = torch.mm(g.T, inner_down_NR[rows] * weight_n1).mul_(experts.scale)
                if grad_x_NH is not None:
                    experts.back(g_up, views, 0, up_a_ERI[expert], g_inner_up, grad_x_NH[rows])

        # one gathering sum over K: on a CPU several times faster than a scatter, and in a fixed order
        grad_x_TH = None if grad_x_NH is None else F.embedding_bag(place_TK, grad_x_NH, mode="sum")
        grad_weights_TK = grad_weight_N[place_TK].to(weights_TK.dtype)
        return (grad_x_TH, grad_weights_TK, *(grads or [None] * 4), None, None, None)


def routed_experts(
    module: nn.Module,
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    order: Order,
    names: tuple[str, str],
    factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Both projections and the gate of a layer, times the routing weights, [T, H] -> [T, H].

    Gradient flows to `x_TH`, `weights_TK` and the factors.

    Args:
        names: the module's names of the up and the down projection.
        factors: A [E, R, in] and B [E, out, R] of the up, then of the down projection; R may be 0.

    Raises:
        MelinoeError: a record of a paged expert could not be read, in either pass.
    """
    experts = _Experts(module, names, order, scale)
    return _RoutedExperts.apply(x_TH, weights_TK, *factors, order.token_N, order.place_TK, experts)
