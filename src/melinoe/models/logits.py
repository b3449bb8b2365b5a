"""One forward pass for the logits of chosen positions alone: what tuning and the measurements ask a model
for. Or for what the output layer is given there, where logits are nothing but what that layer makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    rows_N = _rows(chosen_BS)
    with output_layer_given(model, ids_BS, lambda hidden_TH: hidden_TH[rows_N]) as seen:
        logits = model(input_ids=ids_BS, attention_mask=batch["attention_mask"], use_cache=False).logits
    logits_NV = logits.reshape(-1, logits.shape[-1])
    return (logits_NV if seen.given else logits_NV[rows_N]).float()


def hidden_at(model: nn.Module, batch: dict[str, torch.Tensor], chosen_BS: torch.Tensor) -> torch.Tensor:
    """[N, H] what the output layer is given at the chosen positions, in order; it computes one row alone.

    Only for models whose logits are the output layer's own (`tuning.step.pieces`).
    """
    ids_BS = batch["input_ids"]
    with output_layer_given(model, ids_BS, lambda hidden_TH: hidden_TH[:1]) as seen:
        model(input_ids=ids_BS, attention_mask=batch["attention_mask"], use_cache=False)
    [hidden_TH] = seen.given
    return hidden_TH[_rows(chosen_BS)]


def _rows(chosen_BS: torch.Tensor) -> torch.Tensor:
    return chosen_BS.reshape(-1).nonzero()[:, 0]


class Seen:
    """given: [T, H], once for each time that an output layer was called with every position.

    returned: what it returned, each time.
    """

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []
        self.returned: list[torch.Tensor] = []

    def returned_alone(self, logits: torch.Tensor) -> bool:
        """Whether these logits are the output layer's own, of every position and of one call."""
        return len(self.given) == len(self.returned) == 1 and self.returned[0] is logits


@contextmanager
def output_layer_given(
    model: nn.Module, ids_BS: torch.Tensor, chosen: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Iterator[Seen]:
    """Listens to a model's output layer.

    Args:
        chosen: the rows of [T, H] that the layer is given in place of all; None: all.
    """
    seen = Seen()

    def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].shape[:2] != ids_BS.shape:
            return None
        hidden_TH = args[0].reshape(-1, args[0].shape[-1])
        seen.given.append(hidden_TH)
        return None if chosen is None else (chosen(hidden_TH)[None], *args[1:])

    def after(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        seen.returned.append(output)

    output_layer = unwrapped(model).get_output_embeddings()  # type: ignore[operator]
    hooks = [output_layer.register_forward_pre_hook(before)] if output_layer is not None else []
    hooks += [output_layer.register_forward_hook(after)] if output_layer is not None else []
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
