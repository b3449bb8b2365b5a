"""Finds the experts and the routers of any transformers model.

transformers decorates nearly every experts class (`use_experts_implementation`; melinoe.models.undecorated
has the others) and records every router (`_can_record_outputs["router_logits"]`), so no table of model names
is needed. Everything above this file speaks of "MoE layer 0, 1, ..." in the order of the model's modules;
dense layers are not counted. router_tap.py listens to the routers that are found here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from melinoe.errors import MelinoeError
from melinoe.models import undecorated
from melinoe.models.supported import no_experts


@dataclass(frozen=True)
class MoeLayer:
    """One mixture-of-experts layer: its experts module and the router that feeds it."""

    index: int
    experts_name: str
    experts: nn.Module
    router_name: str
    router: nn.Module
    # what the router returned -> (logits [T, E], weights [T, K], indices [T, K])
    routing_of: Callable[[Any], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        repr=False, compare=False
    )

    @property
    def num_experts(self) -> int:
        return int(self.experts.num_experts)  # type: ignore[arg-type]


def is_experts(module: nn.Module) -> bool:
    """Whether a module is decorated for transformers' ExpertsInterface."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "num_experts"))


def experts_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of every experts module, in module order.

    Experts that transformers does not decorate are given the decorator's attributes on the way: they compute
    as before.
    """
    undecorated.decorate(model)
    return [(name, module) for name, module in model.named_modules() if is_experts(module)]


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """An experts module's own (name, parameter) pairs, in the order of its record."""
    return list(module.named_parameters(recurse=False))


def per_expert(parameter: torch.Tensor, num_experts: int) -> torch.Tensor:
    """A parameter with one row per expert in dimension 0.

    [E, ...] stays as it is, dbrx's [E * F, H] becomes [E, F, H].
    """
    if parameter.shape[0] == num_experts:
        return parameter
    assert parameter.shape[0] % num_experts == 0, (parameter.shape, num_experts)
    return parameter.unflatten(0, (num_experts, -1))


def _routers(model: nn.Module, experts_names: list[str]) -> dict[str, tuple[nn.Module, int]]:
    """{name: (router, index of the logits in its output)}.

    From transformers' own recording table; and, because that table has only routers whose choice is
    learned, what is called a router beside experts (deepseek_v4's first layers look experts up by token).
    """
    found: dict[str, tuple[nn.Module, int]] = {}
    for owner in model.modules():
        spec = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits")
        for one in [] if spec is None else spec if isinstance(spec, list) else [spec]:
            target = getattr(one, "target_class", one)
            for name, module in model.named_modules():
                if isinstance(target, type) and isinstance(module, target):
                    found[name] = (module, getattr(one, "index", 0))
    for owner_name in {name.rpartition(".")[0] for name in experts_names}:
        for name, module in model.get_submodule(owner_name).named_children():
            if type(module).__name__.endswith("Router"):
                found.setdefault(f"{owner_name}.{name}", (module, 0))
    return found


def _shared_steps(one: str, other: str) -> int:
    """How many steps of two dotted names agree from the start."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _routing_of(
    model: nn.Module, router_name: str, logits_index: int, num_experts: int, output: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a router decided, from what it returned: (logits [T, E], weights [T, K], indices [T, K])."""
    if isinstance(output, tuple) and len(output) >= 3:
        logits, weights, indices = output[logits_index], output[1], output[2]
    else:
        logits, weights, indices = undecorated.routing_of(model, router_name, output)
    # zaya has one more column, for tokens that skip the experts: to those it gives expert 0 with weight 0
    return logits.reshape(-1, logits.shape[-1])[:, :num_experts], weights, indices


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """The MoE layers of a model, each with its router.

    Raises:
        MelinoeError: a dense model, a family that cannot be offloaded, or experts without a router.
    """
    modules = experts_modules(model)
    if not modules:
        raise no_experts(model.config)
    names = [name for name, _ in modules]
    routers = _routers(model, names)
    layers = []
    for index, (name, module) in enumerate(modules):
        # the router of a layer shares the longest path with its experts, and with no others so long a one
        nearest = max(routers, key=lambda router: _shared_steps(router, name), default="")
        others = (_shared_steps(nearest, other) for other in names if other != name)
        if not nearest or _shared_steps(nearest, name) <= max(others, default=0):
            raise MelinoeError(f"no router found for {name}", got=type(model).__name__)
        router, logits_index = routers.pop(nearest)
        num_experts = int(module.num_experts)  # type: ignore[arg-type]
        routing_of = partial(_routing_of, model, nearest, logits_index, num_experts)
        layers.append(MoeLayer(index, name, module, nearest, router, routing_of))
    return layers


_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_topk", "experts_per_token",
    "moe_top_k",
)  # fmt: skip


def experts_per_token(model: nn.Module) -> int:
    """K, from the config (transformers names it num_experts_per_tok, or by an attribute map)."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    nested = getattr(config, "ffn_config", None)  # dbrx's
    for name in _EXPERTS_PER_TOKEN:
        value = getattr(config, name, getattr(nested, name, None))
        if value is not None:
            return int(value[0] if isinstance(value, list | tuple) else value)
    raise MelinoeError("the config does not say how many experts a token uses", got=type(config).__name__)


def check_experts_per_token(model: nn.Module, num_experts: int) -> None:
    """Raises MelinoeError where a config asks for more experts per token than a layer has."""
    if experts_per_token(model) > num_experts:
        raise MelinoeError(
            "the config asks for more experts per token than a layer has",
            got=f"{experts_per_token(model)} of {num_experts}",
            next_step="check its config.json",
        )


def fingerprint(model: nn.Module) -> str:
    """Identifies the routing of a model: 16 hexadecimal digits.

    Two models share it when the shape of their mixture and their routers' weights agree (compared in
    bfloat16, so that loading in another dtype does not matter). Experts of another width, precision or
    low-rank addition keep it: the same tokens ask the same experts of the same routers. Traces,
    predictors, adapters and stores carry it and refuse each other when it differs.
    """
    digest = hashlib.sha256(str(getattr(model.config, "model_type", "")).encode())
    for layer in moe_layers(model):
        digest.update(f"{layer.index}:{layer.num_experts}:{experts_per_token(model)};".encode())
        for name, tensor in sorted(layer.router.state_dict().items()):
            values = tensor.detach().cpu().contiguous()
            if tensor.is_floating_point():  # else a table of experts by token, as deepseek_v4 has
                values = values.to(torch.bfloat16).view(torch.int16)
            digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]
