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


def _routers(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """{name: (router, index of the logits in its output)}, from transformers' own recording table."""
    found: dict[str, tuple[nn.Module, int]] = {}
    for owner in model.modules():
        spec = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits")
        for one in [] if spec is None else spec if isinstance(spec, list) else [spec]:
            target = getattr(one, "target_class", one)
            for name, module in model.named_modules():
                if isinstance(target, type) and isinstance(module, target):
                    found[name] = (module, getattr(one, "index", 0))
    return found


def _shared_steps(one: str, other: str) -> int:
    """How many steps of two dotted names agree from the start."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """The MoE layers of a model, each with its router.

    Raises:
        MelinoeError: a dense model, or experts whose router cannot be found.
    """
    modules = experts_modules(model)
    if not modules:
        raise MelinoeError(
            "not a mixture-of-experts model that transformers' ExpertsInterface covers",
            got=type(model).__name__,
            allowed="a model with experts modules, such as OLMoE, Mixtral, Qwen3-MoE or gpt-oss",
        )
    routers = _routers(model)
    layers = []
    for index, (name, module) in enumerate(modules):
        # the router of a layer is the one that shares the longest path with the experts
        nearest = max(routers, key=lambda router: _shared_steps(router, name), default=None)
        if nearest is None:
            raise MelinoeError(f"no router found for {name}", got=type(model).__name__)
        router, logits_index = routers.pop(nearest)
        routing_of = partial(undecorated.routing_of, model, nearest, logits_index=logits_index)
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
            if tensor.is_floating_point():
                values = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
                digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]
