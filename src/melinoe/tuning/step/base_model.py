"""The base model inside the tuned one: distillation needs no second model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from melinoe.models.layers import MoeLayer
from melinoe.models.logits import unwrapped


@contextmanager
def as_base(model: nn.Module, layers: list[MoeLayer], base_routers: list[nn.Module]) -> Iterator[None]:
    """The model as it was before tuning: frozen routers in place of the tuned ones, no low-rank factors."""
    factors = [getattr(layer.experts, "low_rank", None) for layer in layers]

    def put(routers: list[nn.Module], low_rank: list[Any]) -> None:
        for layer, router, factor in zip(layers, routers, low_rank, strict=True):
            parent, _, name = layer.router_name.rpartition(".")
            setattr(unwrapped(model).get_submodule(parent), name, router)
            layer.experts.low_rank = factor

    put(base_routers, [None] * len(layers))
    try:
        yield
    finally:
        put([layer.router for layer in layers], factors)
