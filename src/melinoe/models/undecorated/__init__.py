"""Experts that transformers does not decorate for its ExpertsInterface: one file for each family.

`decorate` says about such experts what transformers' decorator would have said, which changes nothing in what
the model computes; `take_over` makes them call an experts function as decorated classes do; `routing_of`
reads what their routers return. A family's file says in which facts it differs from every decorated class.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from melinoe.errors import MelinoeError
from melinoe.models.undecorated import dbrx, llama4

ExpertsFunction = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# by the name of a class, not by isinstance: importing the modelling files would cost every model's start
# {experts class: what the decorator would have set on this module}
_FACTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Llama4TextExperts": llama4.experts_facts,
    "DbrxExpertGLU": dbrx.experts_facts,
}
# {class that calls its experts: a forward in which it calls `self.melinoe_function` instead}
_FORWARDS: dict[str, Callable[..., Any]] = {
    "Llama4TextMoe": llama4.moe_forward,
    "DbrxExperts": dbrx.experts_forward,
}


def _class_name(module: nn.Module) -> str:
    return type(module).__name__ if type(module).__module__.startswith("transformers.models.") else ""


def decorate(model: nn.Module) -> None:
    """Sets the decorator's attributes (`has_gate`, `is_transposed`, ...) on experts that lack them."""
    for module in model.modules():
        facts = _FACTS.get(_class_name(module))
        if facts is not None and not hasattr(module, "has_gate"):
            for name, value in facts(module).items():
                setattr(module, name, value)


def is_undecorated(model: nn.Module) -> bool:
    """Whether the model's experts are of a class that transformers does not decorate."""
    return any(_class_name(module) in _FORWARDS for module in model.modules())


def has_flat_experts(model: nn.Module) -> bool:
    """Whether all experts of a layer lie in one [E * F, H] matrix (dbrx); PEFT cannot name one of them."""
    return any(_class_name(module) == "DbrxExpertGLU" for module in model.modules())


def take_over(model: nn.Module, function: ExpertsFunction) -> bool:
    """Makes undecorated experts of this model (not of its class) call `function`; False: it has none."""
    decorate(model)
    for module in model.modules():
        forward = _FORWARDS.get(_class_name(module))
        if forward is not None:
            module.melinoe_function = function  # type: ignore[assignment]
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    return is_undecorated(model)


def routing_of(
    model: nn.Module, router_name: str, output: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a router decided, from what it returned: (logits [T, E], weights [T, K], indices [T, K]).

    A family's own function makes the choice again, by the same operation on the same values as the model
    does behind the router, without gradient: what autograd saved here, gradient checkpointing would miss in
    its second pass, to which nobody listens.

    Raises:
        MelinoeError: an output of another form.
    """
    router = model.get_submodule(router_name)
    if _class_name(router) == "Llama4Router":
        return llama4.routing_of(router, output)
    owner = model.get_submodule(router_name.rpartition(".")[0])
    if _class_name(owner) == "DbrxFFN":
        return dbrx.routing_of(owner, output)
    raise MelinoeError(
        f"router {router_name} does not return what the tap can read",
        got=type(output).__name__,
        allowed="(logits, weights, indices), or llama4's and dbrx's forms",
    )
