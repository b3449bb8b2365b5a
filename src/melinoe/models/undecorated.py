"""llama4 and dbrx: experts that transformers does not decorate for its ExpertsInterface.

`describe` says about their experts what the decorator would have said, which changes nothing in what the
model computes; `take_over` makes them call an experts function as decorated classes do. Two facts differ
from every decorated class: llama4 multiplies the INPUT of an expert by its weight (the gate is not linear, so
this is not the same as multiplying the output), and dbrx keeps all experts as rows of flat [E * F, H] matrices
and computes one expert by the forward of `DbrxExpertGLU`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from melinoe.errors import MelinoeError

ExpertsFunction = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_PLAIN = {"has_gate": True, "has_bias": False, "has_post_expert_norm": False}


def _class_name(module: nn.Module) -> str:
    # a name, not isinstance: importing both modelling files would cost every model's start
    return type(module).__name__ if type(module).__module__.startswith("transformers.models.") else ""


def describe(model: nn.Module) -> None:
    """Sets the decorator's attributes (`has_gate`, `is_transposed`, ...) on llama4's and dbrx's experts."""
    for module in model.modules():
        name = _class_name(module)
        if hasattr(module, "has_gate"):
            continue
        if name == "Llama4TextExperts":  # gate_up_proj [E, H, 2F], down_proj [E, F, H]
            facts: dict[str, Any] = {**_PLAIN, "is_transposed": True, "is_concatenated": True}
            facts["_apply_gate"] = MethodType(_gate_first_half, module)
            facts["weights_scale_input"] = True
        elif name == "DbrxExpertGLU":  # w1, v1, w2, each [E * F, H]
            facts = {**_PLAIN, "is_transposed": False, "is_concatenated": False}
            facts["num_experts"] = module.moe_num_experts
            facts["expert_forward"] = MethodType(_dbrx_expert, module)
        else:
            continue
        for key, value in facts.items():
            setattr(module, key, value)


def is_undecorated(model: nn.Module) -> bool:
    """Whether the model's experts are llama4's or dbrx's."""
    return any(_class_name(module) in _FORWARDS for module in model.modules())


def has_flat_experts(model: nn.Module) -> bool:
    """Whether all experts of a layer lie in one [E * F, H] matrix (dbrx), where PEFT cannot name one of them."""
    return any(_class_name(module) == "DbrxExpertGLU" for module in model.modules())


def take_over(model: nn.Module, function: ExpertsFunction) -> bool:
    """Makes undecorated experts of this model (not of its class) call `function`; False: it has none."""
    describe(model)
    for module in model.modules():
        forward = _FORWARDS.get(_class_name(module))
        if forward is not None:
            module.melinoe_function = function  # type: ignore[assignment]
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    return is_undecorated(model)


def routing(model: nn.Module, router_name: str, output: Any, logits_index: int) -> tuple[torch.Tensor, ...]:
    """(logits [T, E], weights [T, K], indices [T, K]) from what a router returned.

    Decorated families return all three. Llama4Router returns (scores, logits) and DbrxRouter logits; there we
    choose by the same operation on the same values as the model does behind the router, without gradient: what
    autograd saved here, gradient checkpointing would miss in its second pass, to which nobody listens.
    """
    if isinstance(output, tuple) and len(output) >= 3:
        return output[logits_index], output[1], output[2]
    router = model.get_submodule(router_name)
    if _class_name(router) == "Llama4Router":
        scores, logits = output
        indices = _llama4_choice(router, logits.detach())
        return logits, scores.detach().gather(1, indices), indices
    owner = model.get_submodule(router_name.rpartition(".")[0])
    if _class_name(owner) == "DbrxFFN":
        weights, indices = owner.route_tokens_to_experts(output.detach())  # type: ignore[operator]
        return output, weights, indices
    raise MelinoeError(
        f"router {router_name} does not return what the tap can read",
        got=type(output).__name__,
        allowed="(logits, weights, indices), or llama4's and dbrx's forms",
    )


def _llama4_choice(router: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    return torch.topk(logits, router.top_k, dim=1).indices  # type: ignore[arg-type]


def _gate_first_half(self: nn.Module, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * self.act_fn(gate)  # type: ignore[operator]


def _dbrx_expert(self: nn.Module, rows: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """[N, H] -> [N, H] by DbrxExpertGLU's own forward; weights: w1, v1, w2, each [F, H]."""
    return type(self).forward(self, rows, weights["w1"], weights["v1"], weights["w2"])


def _llama4_moe(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama4TextMoe.forward with only the chosen experts: (output [T, H], router logits [T, E])."""
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden_states)
    indices = _llama4_choice(self.router, logits)
    routed = self.melinoe_function(self.experts, hidden_states, indices, scores.gather(1, indices))
    return self.shared_expert(hidden_states) + routed, logits


def _dbrx_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """DbrxExperts.forward: hidden states arrive as [B, S, H] and leave so."""
    flat = hidden_states.reshape(-1, self.hidden_size)
    return self.melinoe_function(self.mlp, flat, top_k_index, top_k_weights).view_as(hidden_states)


_FORWARDS: dict[str, Callable[..., Any]] = {"Llama4TextMoe": _llama4_moe, "DbrxExperts": _dbrx_experts}
