"""Experts whose weights pass by, differentiated: what `tuning_experts` does with records instead of parameters.

A slot is overwritten as soon as its expert has been served, so nothing of it may wait for the backward pass: that
asks the pager again, and every expert is read at most once per pass. What is kept are the rows that went in, the
up projection's outputs before the gate, and x A^T of both projections; the gate is computed again.

Each pass begins with the experts that the pass before has left in the slots, so of E experts in C slots a step reads
2 (E - C) per layer, and 3 (E - C) with gradient checkpointing. The policy sees each pass as a prompt of one
token that asks for all experts of the batch, padding included; the statistics count it as training, apart from
prefill and decoding.

Products and sums are those of the resident function, in the same order: with the gate expert by expert instead of
over all rows, which may change the last bit of an activation function, and weights of another dtype converted
to that of the rows at each use.

Shape suffixes as in low_rank.py: N routed rows sorted by expert, H hidden, I inner (what the up projection gives), E
experts, R rank, O and I of a weight its outputs and inputs.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import nn

from melinoe.offload.pager import Views
from melinoe.routing.policies import PREFILL, Call


def training_call(experts: list[int]) -> Call:
    """What the policy sees of one pass: every expert that has rows, asked for once."""
    return Call(np.array([experts], np.int64), np.zeros(1, np.int64), np.ones(1, bool), PREFILL)


def field_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of one expert's tensors, by name, of a module whose experts are paged."""
    pager: Any = module.melinoe_context.pager  # type: ignore[union-attr]
    return pager.weight_shapes(int(module.melinoe_layer))  # type: ignore[arg-type]


class _Served:
    """One layer's experts as a pass needs them: rows and weights of one after the other."""

    def __init__(self, module: Any, names: tuple[str, str], ends: list[int], scale: float) -> None:
        self.module, self.names, self.scale = module, names, scale
        starts = [0, *ends[:-1]]
        self.rows = {e: slice(s, end) for e, (s, end) in enumerate(zip(starts, ends, strict=True)) if end > s}
        self.end = ends[-1]

    def weights(self) -> Any:
        """Yields (expert, its tensors); to be closed by the caller, who must not keep a tensor."""
        pager, layer = self.module.melinoe_context.pager, int(self.module.melinoe_layer)
        return contextlib.closing(pager.serve(layer, training_call(list(self.rows)), training=True))

    def weight_OI(self, views: Views, side: int, dtype: torch.dtype) -> torch.Tensor:
        """A projection's weight in the dtype of the rows; it holds until the next one is asked for."""
        weight = views[self.names[side]]
        if (
            weight.dtype != dtype
        ):  # always into the same memory: fresh pages for every expert cost more than converting
            buffers = self.module.melinoe_context.converted
            key = (*weight.shape, dtype, weight.device)
            if key not in buffers:
                buffers[key] = torch.empty_like(weight, dtype=dtype)
            weight = buffers[key].copy_(weight)
        return weight.T if self.module.is_transposed else weight

    def project(
        self, x: torch.Tensor, views: Views, side: int, a_RI: torch.Tensor, b_OR: torch.Tensor,
        out: torch.Tensor, inner_NR: torch.Tensor,
    ) -> None:  # fmt: skip
        """out = x W^T + scale (x A^T) B^T + bias; `inner_NR` = x A^T."""
        torch.mm(x, self.weight_OI(views, side, x.dtype).T, out=out)
        torch.mm(x, a_RI.T.to(x.dtype), out=inner_NR)
        out.addmm_(inner_NR, b_OR.T.to(x.dtype), alpha=self.scale)
        if self.module.has_bias:
            out.add_(views[f"{self.names[side]}_bias"].to(x.dtype))

    def gate(self, up: torch.Tensor) -> torch.Tensor:
        return self.module._apply_gate(up) if self.module.has_gate else self.module.act_fn(up)


class _PagedRows(torch.autograd.Function):
    """x [N, H] sorted by expert -> [N, H], each row through its expert; the experts' own weights are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NH: torch.Tensor,
        up_a_ERI: torch.Tensor,
        up_b_EOR: torch.Tensor,
        down_a_ERI: torch.Tensor,
        down_b_EOR: torch.Tensor,
        served: _Served,
    ) -> torch.Tensor:
        count, rank = len(x_NH), up_a_ERI.shape[1]
        up_NI = x_NH.new_empty(count, up_b_EOR.shape[1])
        inner_up_NR, inner_down_NR = x_NH.new_empty(count, rank), x_NH.new_empty(count, rank)
        out_NH = x_NH.new_empty(count, down_b_EOR.shape[1])
        with served.weights() as weights:
            for expert, views in weights:
                rows = served.rows[expert]
                served.project(
                    x_NH[rows], views, 0, up_a_ERI[expert], up_b_EOR[expert], up_NI[rows], inner_up_NR[rows]
                )
                act = served.gate(up_NI[rows])
                served.project(
                    act, views, 1, down_a_ERI[expert], down_b_EOR[expert], out_NH[rows], inner_down_NR[rows]
                )
        out_NH[served.end :].zero_()  # expert-parallel sentinels stand behind the last expert
        ctx.save_for_backward(
            x_NH, up_NI, inner_up_NR, inner_down_NR, up_a_ERI, up_b_EOR, down_a_ERI, down_b_EOR
        )
        ctx.served = served
        return out_NH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        served: _Served = ctx.served
        # before the pager is asked: with checkpointing this computes the layer again, which asks it as well
        x_NH, up_NI, inner_up_NR, inner_down_NR, *factors = ctx.saved_tensors
        grad_NH = grad_out.contiguous()
        grad_x_NH = torch.zeros_like(x_NH) if ctx.needs_input_grad[0] else None
        trained = any(ctx.needs_input_grad[1:5])
        grads = [torch.zeros_like(factor) if trained else None for factor in factors]

        def through(
            side: int, expert: int, views: Views, g: torch.Tensor, x: torch.Tensor, inner: torch.Tensor,
            out: torch.Tensor | None,
        ) -> None:  # fmt: skip
            """One projection: the factors' gradients, and into `out` that of its input."""
            a_RI, b_OR = factors[2 * side][expert], factors[2 * side + 1][expert]
            g_inner = torch.mm(g, b_OR.to(g.dtype)).mul_(served.scale)
            grad_a, grad_b = grads[2 * side], grads[2 * side + 1]
            if grad_a is not None and grad_b is not None:
                grad_b[expert] = torch.mm(g.T, inner).mul_(served.scale)
                grad_a[expert] = torch.mm(g_inner.T, x)
            if out is not None:
                torch.mm(g, served.weight_OI(views, side, g.dtype), out=out)
                out.addmm_(g_inner, a_RI.to(g.dtype))

        with served.weights() as weights:
            for expert, views in weights:
                rows = served.rows[expert]
                with torch.enable_grad():
                    up = up_NI[rows].detach().requires_grad_()
                    act = served.gate(up)
                g_act = torch.empty_like(act)
                through(1, expert, views, grad_NH[rows], act.detach(), inner_down_NR[rows], g_act)
                (g_up,) = torch.autograd.grad(act, up, g_act)
                out = None if grad_x_NH is None else grad_x_NH[rows]
                through(0, expert, views, g_up, x_NH[rows], inner_up_NR[rows], out)
        return (grad_x_NH, *grads, None)


def paged_rows(
    module: nn.Module,
    x_NH: torch.Tensor,
    names: tuple[str, str],
    factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    ends: list[int],
) -> torch.Tensor:
    """Both projections and the gate of a layer whose experts are paged, [N, H] -> [N, H].

    Args:
        names: the module's names of the up and the down projection.
        factors: A [E, R, in] and B [E, out, R] of the up, then of the down projection; R may be 0.
        ends: for every expert the row behind its last.

    Raises:
        MelinoeError: a record could not be read, in either pass.
    """
    return _PagedRows.apply(x_NH, *factors, _Served(module, names, ends, scale))
