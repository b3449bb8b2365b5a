"""What an offloaded model does otherwise than its class: methods that are replaced on this one model."""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

from torch import nn

from melinoe.errors import MelinoeError
from melinoe.paging.expansion import slot_layout


def replace_methods(model: Any) -> None:
    """Makes a model refuse what it cannot do without its experts in memory, and count them."""
    model.save_pretrained = MethodType(_refuse_to_save, model)
    model._apply = MethodType(_refuse_to_move, model)
    # transformers' own refuse before they come to _apply, as for models whose weights are of no dtype
    model.float, model.half = MethodType(nn.Module.float, model), MethodType(nn.Module.half, model)
    model.num_parameters = MethodType(_count_all, model)
    model.set_experts_implementation = MethodType(_refuse_other_experts, model)


def _refuse_to_move(self: Any, function: Any, *rest: Any) -> Any:
    """Refuses to move the weights, in the place of `nn.Module._apply`, which to(), half() and cuda() call.

    They may be called on this model or on one around it.
    """
    weight = next(self.parameters())
    moved = function(weight.new_empty(0))
    if (moved.dtype, moved.device) != (weight.dtype, weight.device):
        raise MelinoeError(
            "an offloaded model stays in its dtype and on its device: its experts' slots do not move along",
            got=f"{moved.dtype} on {moved.device}",
            allowed=f"{weight.dtype} on {weight.device}",
            next_step="load it again with melinoe.load(..., device=...)",
        )
    return type(self)._apply(self, function, *rest)


def _refuse_to_save(self: Any, *_: Any, **__: Any) -> None:
    raise MelinoeError(
        "an offloaded model has no experts in memory, save_pretrained would lose them",
        next_step="copy the store folder, or save the checkpoint it was made from",
    )


def _count_all(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """As `PreTrainedModel.num_parameters`, with the experts, which are no parameters here.

    None of them is trained.
    """
    held = type(self).num_parameters(self, only_trainable, exclude_embeddings)
    if only_trainable:
        return held
    layers = self.melinoe_paged.pager.store.layers
    return held + sum(
        layer.num_experts * sum(math.prod(field.shape) for field in slot_layout(layer, False).fields)
        for layer in layers
    )


def _refuse_other_experts(self: Any, experts_implementation: Any) -> Any:
    """Takes melinoe's own functions alone: any other would look for weights that are not there."""
    names = experts_implementation.values() if isinstance(experts_implementation, dict) else None
    for name in names or [experts_implementation]:
        if not str(name).startswith("melinoe"):
            raise MelinoeError(
                "an offloaded model computes its experts with melinoe's own function",
                got=f"experts implementation {name}",
                next_step="open the checkpoint with transformers, without melinoe, to use another",
            )
    return type(self).set_experts_implementation(self, experts_implementation)
