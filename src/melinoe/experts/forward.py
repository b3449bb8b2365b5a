"""The experts function: what transformers calls in place of its own (ExpertsInterface, "melinoe").

One function for experts that are paged and experts that are resident, with or without low-rank
additions. Every expert's rows are computed at once and written to their own places in one
[T * K, H] buffer; the sum over a token's experts then runs in top-k order. So the result is
bit for bit the same whatever was resident, in whichever order records arrived.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from melinoe.errors import MelinoeError
from melinoe.experts import compiled
from melinoe.experts.few_rows_linear import use_adjacent_outputs, use_few_rows_linears
from melinoe.experts.row_counts import pad
from melinoe.experts.row_order import Order
from melinoe.models import undecorated
from melinoe.models.layers import per_expert
from melinoe.native import gathered
from melinoe.paging.expansion import PackedExpert, kernel_form
from melinoe.paging.paged_experts import PagedExperts
from melinoe.paging.pager import Views
from melinoe.routing.policies import Call

NAME = "melinoe"
UP, DOWN = "gate_up_proj", "down_proj"
Group = list[tuple[int, Views]]  # experts and their tensors
COMBINED_TOKENS = 128  # whose experts' outputs are weighted at once


def expert_output(module: nn.Module, hidden: torch.Tensor, weights: Views, expert: int) -> torch.Tensor:
    """One expert on its rows, [N, H] -> [N, H], as transformers' own functions compute it."""
    # both by dictionary: for what is not there, nn.Module's getattr takes longer than a small matrix
    own_way, low_rank = module.__dict__.get("expert_forward"), module._modules.get("low_rank")
    if own_way is not None:  # dbrx
        return own_way(hidden, weights)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    packed = weights if isinstance(weights, PackedExpert) else None
    few = packed is None and not module.is_transposed and compiled.few(hidden)
    if low_rank is None and compiled.is_gated_silu(module):
        out = _gated(hidden, [weights])
        if out is not None:
            return out

    def project(rows: torch.Tensor, name: str, side: str) -> torch.Tensor:
        out = packed.product(rows, name) if packed is not None else None
        if few:
            out = compiled.product(rows, weights[name])
        if out is None:
            weight = weights[name]
            out = rows @ weight if module.is_transposed else F.linear(rows, weight)
        if low_rank is not None:
            out = out + low_rank.term(rows, expert, side)  # type: ignore[operator]
        return out + weights[f"{name}_bias"] if module.has_bias else out

    inner = project(hidden, up, "up")
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # type: ignore[operator]
    out = project(inner, "down_proj", "down")
    return module.post_expert_norm(out) if module.has_post_expert_norm else out  # type: ignore[operator]


def experts_outputs(module: nn.Module, hidden_1H: torch.Tensor, experts: list[Views]) -> torch.Tensor:
    """[K, H] outputs of one token's experts, all of which are at hand; the bits of `expert_output` of each.

    Without low-rank additions.
    """
    found = _gated(hidden_1H, experts) if compiled.is_gated_silu(module) else None
    if found is not None:
        return found
    return torch.cat([expert_output(module, hidden_1H, one, -1) for one in experts])


def _gated(hidden_NH: torch.Tensor, experts: list[Views]) -> torch.Tensor | None:
    """[E * N, H] of experts with silu on the same few rows, in one call; None: step by step."""
    first, *others = experts
    on_device = _on_device(hidden_NH, experts) if 0 < len(hidden_NH) <= gathered.FEW_ROWS else None
    if on_device is not None:
        return gathered.gated(hidden_NH, *on_device)
    if isinstance(first, PackedExpert):
        return first.gated([one for one in others if isinstance(one, PackedExpert)], hidden_NH, UP, DOWN)
    if not compiled.few(hidden_NH):
        return None
    return compiled.gated(hidden_NH, [one[UP] for one in experts], [one[DOWN] for one in experts])


def _on_device(
    hidden_NH: torch.Tensor, experts: list[Views]
) -> tuple[list[tuple[torch.Tensor, ...]], gathered.Form] | None:
    """The matrices of experts and how they lie, for a GPU's kernels; None: these do not compute them."""
    if not gathered.usable(hidden_NH.device):
        return None
    parts, form = [matrices(one) for one in experts], form_of(experts[0])
    fits = form.computed and gathered.fits(hidden_NH, _dtype(experts[0]), parts)
    return (parts, form) if fits else None


def matrices(weights: Views) -> tuple[torch.Tensor, ...]:
    """The two matrices of an expert; where they are packed, codes and scales of each."""
    if isinstance(weights, PackedExpert):
        return *weights.matrix(UP), *weights.matrix(DOWN)
    return weights[UP], weights[DOWN]


def _dtype(weights: Views) -> torch.dtype:
    return (weights.layer.views if isinstance(weights, PackedExpert) else weights)[UP].dtype


def form_of(weights: Views) -> gathered.Form:
    """How they lie in memory."""
    if isinstance(weights, PackedExpert):
        return kernel_form(weights.layer.packing, weights.layer.out[UP] // 2, weights.layer.tile)
    return gathered.Form(weights[DOWN].shape[1])


def _resident(module: nn.Module, experts: Iterable[int]) -> Generator[Group]:
    parameters = {
        name: per_expert(parameter, int(module.num_experts))  # type: ignore[arg-type]
        for name, parameter in module.named_parameters(recurse=False)
    }
    yield [
        (expert, {name: parameter[expert] for name, parameter in parameters.items()}) for expert in experts
    ]


def _served(
    module: nn.Module, paged: PagedExperts | None, indices: np.ndarray, experts: Iterable[int]
) -> Generator[Group]:
    """(expert, its tensors) for every expert of the call, in groups that are at hand together."""
    if paged is None:
        return _resident(module, experts)
    call: Call = paged.call(indices)
    return paged.pager.serve_groups(int(module.melinoe_layer), call)  # type: ignore[arg-type]


def _one_token(
    module: nn.Module,
    paged: PagedExperts | None,
    hidden_1H: torch.Tensor,
    indices: np.ndarray,
    scale_TK: torch.Tensor | None,
) -> torch.Tensor | None:
    """[K, H] outputs of one token's distinct experts: decoding, without gathering and scattering.

    There is nothing to sort (`Order`) either: each expert has one row, and K tensors of one element would
    cost more than the experts of a small model.

    scale_TK: what each expert's input is multiplied by (llama4), or None.
    """
    num_experts = int(module.num_experts)  # type: ignore[arg-type]
    asked = indices[0].tolist()
    place = {expert: position for position, expert in enumerate(asked) if expert < num_experts}
    served = _served(module, paged, indices, place)
    parts: dict[int, torch.Tensor] = {}
    together = scale_TK is None and "low_rank" not in module._modules
    with contextlib.closing(served):
        for group in served:
            if together:
                outputs = experts_outputs(module, hidden_1H, [weights for _, weights in group])
                parts |= {place[expert]: outputs[at : at + 1] for at, (expert, _) in enumerate(group)}
                continue
            for expert, weights in group:
                inputs_1H = hidden_1H if scale_TK is None else hidden_1H * scale_TK[0, place[expert]]
                parts[place[expert]] = expert_output(module, inputs_1H, weights, expert)
    if not parts:
        return None
    nothing = None if len(parts) == len(asked) else torch.zeros_like(next(iter(parts.values())))  # sentinels
    return torch.cat([parts.get(position, nothing) for position in range(len(asked))])  # type: ignore[misc]


def _many_tokens(
    module: nn.Module,
    paged: PagedExperts | None,
    hidden_TH: torch.Tensor,
    top_k_index: torch.Tensor,
    indices: np.ndarray,
    scale_TK: torch.Tensor | None,
) -> torch.Tensor | None:
    """[T * K, H] outputs, every expert's rows computed at once and put in their own places."""
    tokens, top_k = indices.shape
    order = Order.of(top_k_index, int(module.num_experts), indices)  # type: ignore[arg-type]
    rows = order.rows
    served = _served(module, paged, indices, rows)
    outputs: torch.Tensor | None = None
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    few_rows, several = compiled.few_rows(module, hidden_TH), _several(module, hidden_TH, scale_TK)

    def all_outputs(like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(tokens * top_k, like.shape[-1]) if outputs is None else outputs

    with contextlib.closing(served):
        for group in served:
            if several is not None:
                outputs = all_outputs(hidden_TH)
                done = several(hidden_TH, group, order, outputs)
                group = [one for one in group if one[0] not in done]
            for expert, weights in group:
                positions = order.choice_N[rows[expert]]
                few = weights.few_rows if isinstance(weights, PackedExpert) else few_rows
                computed = positions if len(positions) <= few else pad(positions, hidden_TH)
                inputs_NH = hidden_TH[computed // top_k]
                if scale_TK is not None:
                    inputs_NH = inputs_NH * scale_TK.reshape(-1, 1)[computed]
                part = expert_output(module, inputs_NH, weights, expert)[: len(positions)]
                if paged is None and several is None:
                    parts.append((positions, part))  # kept whole for autograd
                    continue
                outputs = all_outputs(part)
                outputs[positions] = part
    if parts:
        places = torch.cat([positions for positions, _ in parts])
        stacked = torch.cat([part for _, part in parts])
        outputs = stacked.new_zeros(tokens * top_k, stacked.shape[-1]).index_copy(0, places, stacked)
    return outputs


Several = Callable[[torch.Tensor, Group, Order, torch.Tensor], set[int]]


def _several(module: nn.Module, hidden_TH: torch.Tensor, scale_TK: torch.Tensor | None) -> Several | None:
    """What computes those experts of a group that can be computed together, and says which they were.

    It is given the rows, the group, the order of rows, and where outputs are written to. None: there is none.
    """
    if scale_TK is not None or "low_rank" in module._modules or not hidden_TH.is_contiguous():
        return None
    gradients = torch.is_grad_enabled() and any(one.requires_grad for one in module.parameters())
    if gradients or not compiled.is_gated_silu(module):
        return None
    if gathered.usable(hidden_TH.device):
        return _gathered
    return _compiled if compiled.few_rows(module, hidden_TH) > 0 else None


def _compiled(hidden_TH: torch.Tensor, group: Group, order: Order, outputs: torch.Tensor) -> set[int]:
    rows = order.rows
    here = [(e, w) for e, w in group if _takes_rows(rows[e].stop - rows[e].start, w)]
    if not here or len(group) < torch.get_num_threads():  # each matrix is divided among them
        return set()
    choices = [order.choice_N[rows[expert]] for expert, _ in here]
    ups, downs = ([weights[name] for _, weights in here] for name in (UP, DOWN))
    compiled.gated_rows(hidden_TH, choices, ups, downs, outputs)
    return {expert for expert, _ in here}


def _gathered(hidden_TH: torch.Tensor, group: Group, order: Order, outputs: torch.Tensor) -> set[int]:
    rows = order.rows
    here = [(e, w) for e, w in group if rows[e].stop - rows[e].start <= gathered.FEW_ROWS]
    if not here:
        return set()
    on_device = _on_device(hidden_TH, [weights for _, weights in here])
    if on_device is None:
        return set()
    parts, form = on_device
    gathered.gated_rows(hidden_TH, [order.choice_N[rows[e]] for e, _ in here], parts, outputs, form)
    return {expert for expert, _ in here}


def _takes_rows(count: int, weights: Views) -> bool:
    return not isinstance(weights, PackedExpert) and compiled.takes_rows(count, weights[UP], weights[DOWN])


def compute_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Transformers' experts contract.

    Args:
        hidden_states: [T, H].
        top_k_index: [T, K]; ids >= num_experts belong to other processes and add nothing.
        top_k_weights: [T, K].

    Returns:
        [T, H] in the dtype of hidden_states.

    Raises:
        MelinoeError: a record could not be read, or gradients were asked of paged experts.
    """
    tokens, top_k = top_k_index.shape
    paged: PagedExperts | None = getattr(module, "melinoe_paged", None)
    if paged is not None and paged.in_place is not None:
        return paged.in_place(module, hidden_states, top_k_index, top_k_weights)
    if paged is not None:
        paged.at_layer(module.melinoe_layer, tokens)  # type: ignore[arg-type]
    indices = top_k_index.detach().cpu().numpy()  # the layer's one synchronisation with a device
    if paged is not None and torch.is_grad_enabled() and hidden_states.requires_grad:
        raise MelinoeError(
            "offloaded experts cannot pass gradients: their slots are overwritten",
            next_step="tune the checkpoint, not the store, or use torch.no_grad()",
        )
    scale_TK = top_k_weights if getattr(module, "weights_scale_input", False) else None  # llama4
    distinct = tokens == 1 and len(set(indices[0].tolist())) == top_k  # sentinels may repeat
    if distinct and not (torch.is_grad_enabled() and hidden_states.requires_grad):
        outputs = _one_token(module, paged, hidden_states, indices, scale_TK)
    else:
        outputs = _many_tokens(module, paged, hidden_states, top_k_index, indices, scale_TK)
    if outputs is None:  # no tokens, or nothing but sentinels
        return torch.zeros_like(hidden_states)
    return combine(outputs, top_k_weights if scale_TK is None else None, top_k, hidden_states.dtype)


# what transformers calls: which experts are where is no part of a graph
melinoe_experts = torch.compiler.disable(compute_experts)


def combine(
    outputs: torch.Tensor, weights_TK: torch.Tensor | None, top_k: int, dtype: torch.dtype
) -> torch.Tensor:
    """[T * K, H] -> [T, H]: the outputs of a token's experts, weighted and added in top-k order.

    Some tokens at a time: the products, which routers in float32 make float32, would otherwise be the largest
    tensor of a pass. Every token's sum is the same.
    """
    parts = []
    for start in range(0, len(outputs) // top_k, COMBINED_TOKENS):
        stop = start + COMBINED_TOKENS
        terms = outputs[start * top_k : stop * top_k].view(-1, top_k, outputs.shape[-1])
        if weights_TK is not None:
            terms = terms * weights_TK[start:stop].unsqueeze(-1)
        parts.append(terms.sum(1).to(dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def use_melinoe_experts(model: Any) -> None:
    """Switches a transformers model, paged or resident, to melinoe's experts function and kernels."""
    if model.device.type == "cpu" and model.dtype == torch.bfloat16 and compiled.prepare():
        use_few_rows_linears(model)
    use_adjacent_outputs(model)
    if not undecorated.take_over(model, melinoe_experts):
        model.set_experts_implementation(NAME)


if NAME not in ALL_EXPERTS_FUNCTIONS:
    ALL_EXPERTS_FUNCTIONS.register(NAME, melinoe_experts)
