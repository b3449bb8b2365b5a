"""The model that is tuned: opened resident or paged.

It is frozen but for its routers and the experts' new factors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from melinoe.errors import MelinoeError
from melinoe.experts.low_rank import EXPERTS_FUNCTION, attach_low_rank, tuning_experts
from melinoe.models.folder import local_folder, resolve_model
from melinoe.models.layers import MoeLayer, experts_per_token, moe_layers
from melinoe.models.pretrained import load_model
from melinoe.models.undecorated import take_over
from melinoe.runtime.load import load_for_tuning
from melinoe.sticky.model import make_sticky
from melinoe.tuning.memory.needed import check_family, compute_dtype
from melinoe.tuning.memory.pages import Pages
from melinoe.tuning.settings import TuneSettings


def prepare_model(
    source: str | Path, settings: TuneSettings, device: str, pages: Pages | None = None
) -> tuple[nn.Module, list[MoeLayer]]:
    """Loads a model for tuning: everything frozen but float32 routers and fresh low-rank factors.

    Args:
        source: checkpoint folder, store, Hub id or `tiny`.
        pages: None: the experts are resident.

    Raises:
        MelinoeError: not a mixture-of-experts model, or one of a family that cannot be tuned.
    """
    model = _load(source, compute_dtype(settings, device), device, pages)
    if settings.gradient_checkpointing:
        _checkpoint_activations(model)
    model.config.output_router_logits = False  # its load-balancing loss fights locality
    layers = moe_layers(model)
    model.requires_grad_(False)
    check_family(model)
    generator = torch.Generator().manual_seed(settings.seed)
    for layer in layers:
        settings.capacity(layer.num_experts, experts_per_token(model))  # refuses before any work
        where = next(layer.router.parameters()).device
        attach_low_rank(layer.experts, settings.rank, settings.alpha, generator, where)
        layer.experts.low_rank.requires_grad_(settings.form.experts)
        layer.router.float().requires_grad_(True)
        if model.dtype != torch.float32:
            layer.router.register_forward_pre_hook(_float32_inputs)
    make_sticky(model, settings.stickiness(layers[0].num_experts, experts_per_token(model)))
    if not take_over(model, tuning_experts):
        model.set_experts_implementation(EXPERTS_FUNCTION)
    return model, layers


def _load(source: str | Path, dtype: torch.dtype | None, device: str, pages: Pages | None) -> Any:
    """dtype None: the checkpoint's own."""
    if pages is not None:
        return load_for_tuning(pages.folder, pages.slots, dtype, device, pages.slots_format)
    folder = local_folder(resolve_model(source))
    return load_model(folder, dtype=dtype or "auto")


def _checkpoint_activations(model: Any) -> None:
    """Every decoder layer keeps its input alone and computes the rest again in the backward pass."""
    if not model.supports_gradient_checkpointing:
        raise MelinoeError(
            "this model knows no gradient checkpointing",
            got=type(model).__name__,
            next_step="leave out --gradient-checkpointing",
        )
    # the reentrant kind gives router logits without a gradient, silently
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # only the reentrant kind needs them


def _float32_inputs(_router: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
