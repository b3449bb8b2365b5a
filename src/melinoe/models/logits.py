"""One forward pass for the logits of chosen positions alone: what tuning and the measurements ask a model
for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where accelerate put DistributedDataParallel around it."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def logits_at(model: nn.Module, batch: dict[str, torch.Tensor], chosen_BS: torch.Tensor) -> torch.Tensor:
    """[N, V] float32 logits of the chosen positions alone, in order.

    The output layer sees only these: with short answers it would otherwise be a third of a small model's
    work. Labels are not passed, because several models then add their load-balancing loss, which fights
    locality.

    Args:
        batch: input_ids, attention_mask [B, S].
        chosen_BS: [B, S] bool.
    """
    ids_BS = batch["input_ids"]
    rows_N = chosen_BS.reshape(-1).nonzero()[:, 0]
    hooked = False

    def only_chosen(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal hooked
        if not args or args[0].shape[:2] != ids_BS.shape:
            return None
        hooked = True
        return (args[0].reshape(-1, args[0].shape[-1])[rows_N][None], *args[1:])

    output_layer = unwrapped(model).get_output_embeddings()  # type: ignore[operator]
    handle = output_layer.register_forward_pre_hook(only_chosen) if output_layer is not None else None
    try:
        logits = model(input_ids=ids_BS, attention_mask=batch["attention_mask"], use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    logits_NV = logits.reshape(-1, logits.shape[-1])
    return (logits_NV if hooked else logits_NV[rows_N]).float()
