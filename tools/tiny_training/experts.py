"""A fast experts forward for training tiny MoE models on a CPU; used by `train` and nothing else.

Stock implementations spend most of their time in small elementwise kernels and scattered index
updates. Here tokens are sorted by expert once, every expert is one matmul on a contiguous slice, and
the backward pass is written out, so that the whole layer is two opaque operators to torch.compile.
Same contract and same result as transformers' implementations; measured 1.1 times the speed of
grouped_mm alone and 1.4 times with the rest of the model compiled (one core, 4,096 tokens).

Shape suffixes: T tokens, K experts per token, E experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NAME = "melinoe_tiny_sorted"


def _gate(a: Tensor) -> Tensor:
    gate, up = a.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _gate_backward(a: Tensor, grad: Tensor) -> Tensor:
    gate, up = a.chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    return torch.cat([grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu], -1)


_kernels: dict[str, Callable[..., Tensor]] = {"gate": _gate, "gate_backward": _gate_backward}


def _slices(counts_E: Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows among the sorted ones) for every expert that has tokens."""
    result, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            result.append((expert, slice(start, start + count)))
        start += count
    return result


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    return inverse


@torch.library.custom_op("melinoe_tiny::experts", mutates_args=())
def experts(
    h_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up_EGH: Tensor, down_EHF: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output [T, H], then what the backward pass needs."""
    tokens, top_k = index_TK.shape
    flat = index_TK.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=gate_up_EGH.shape[0])
    x = h_TH.index_select(0, order // top_k)
    a = x.new_empty(tokens * top_k, gate_up_EGH.shape[1])
    for expert, rows in _slices(counts):
        torch.mm(x[rows], gate_up_EGH[expert].t(), out=a[rows])
    act = _kernels["gate"](a)
    y = torch.empty_like(x)
    for expert, rows in _slices(counts):
        torch.mm(act[rows], down_EHF[expert].t(), out=y[rows])
    y_TKH = y.index_select(0, _inverse(order)).view(tokens, top_k, -1)
    return torch.bmm(weight_TK.unsqueeze(1), y_TKH).squeeze(1), x, a, act, y_TKH, order, counts


@torch.library.custom_op("melinoe_tiny::experts_backward", mutates_args=())
def experts_backward(
    grad_TH: Tensor, weight_TK: Tensor, gate_up_EGH: Tensor, down_EHF: Tensor,
    x: Tensor, a: Tensor, act: Tensor, y_TKH: Tensor, order: Tensor, counts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the hidden states, the routing weights and the two expert matrices."""
    tokens, top_k, hidden = y_TKH.shape
    grad_TH = grad_TH.contiguous()
    grad_weight_TK = torch.bmm(y_TKH, grad_TH.unsqueeze(2)).squeeze(2)
    grad_y = grad_TH.index_select(0, order // top_k).mul_(weight_TK.reshape(-1)[order].unsqueeze(1))
    grad_act, grad_down = torch.empty_like(act), torch.zeros_like(down_EHF)
    for expert, rows in _slices(counts):
        torch.mm(grad_y[rows], down_EHF[expert], out=grad_act[rows])
        torch.mm(grad_y[rows].t(), act[rows], out=grad_down[expert])
    grad_a = _kernels["gate_backward"](a, grad_act)
    grad_x, grad_gate_up = torch.empty_like(x), torch.zeros_like(gate_up_EGH)
    for expert, rows in _slices(counts):
        torch.mm(grad_a[rows], gate_up_EGH[expert], out=grad_x[rows])
        torch.mm(grad_a[rows].t(), x[rows], out=grad_gate_up[expert])
    grad_h_TH = grad_x.index_select(0, _inverse(order)).view(tokens, top_k, hidden).sum(1)
    return grad_h_TH, grad_weight_TK, grad_gate_up, grad_down


@experts.register_fake
def _(h_TH, index_TK, weight_TK, gate_up_EGH, down_EHF):  # type: ignore[no-untyped-def]
    tokens, top_k = index_TK.shape
    count, wide, hidden = gate_up_EGH.shape
    new = h_TH.new_empty
    pairs = tokens * top_k
    saved = new(pairs, hidden), new(pairs, wide), new(pairs, wide // 2), new(tokens, top_k, hidden)
    return new(tokens, hidden), *saved, index_TK.new_empty(pairs), index_TK.new_empty(count)


@experts_backward.register_fake
def _(grad_TH, weight_TK, gate_up_EGH, down_EHF, x, a, act, y_TKH, order, counts):  # type: ignore[no-untyped-def]
    hidden = torch.empty_like(grad_TH, memory_format=torch.contiguous_format)
    return hidden, torch.empty_like(weight_TK), torch.empty_like(gate_up_EGH), torch.empty_like(down_EHF)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, weight_TK, gate_up_EGH, down_EHF = inputs
    ctx.save_for_backward(weight_TK, gate_up_EGH, down_EHF, *output[1:])


def _backward(ctx, grad_TH, *_):  # type: ignore[no-untyped-def]
    grad_h, grad_weight, grad_gate_up, grad_down = experts_backward(grad_TH, *ctx.saved_tensors)
    return grad_h, None, grad_weight, grad_gate_up, grad_down


experts.register_autograd(_backward, setup_context=_save)


def register(compile_kernels: bool = False) -> str:
    """Make the function known to transformers; returns the `experts_implementation` name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if compile_kernels:
        _kernels["gate"] = torch.compile(_gate, dynamic=True)
        _kernels["gate_backward"] = torch.compile(_gate_backward, dynamic=True)

    def forward(module: torch.nn.Module, h_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return experts(h_TH, index_TK, weight_TK, module.gate_up_proj, module.down_proj)[0]

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    return NAME
