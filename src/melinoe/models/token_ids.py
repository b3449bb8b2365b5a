"""Token ids that a model does not have: named, before torch's embedding says "index out of range in self"."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from melinoe.errors import MelinoeError
from melinoe.models.forward_inputs import input_ids


def check_ids(ids: torch.Tensor, count: int) -> None:
    """Refuses ids that are not below `count`.

    On an accelerator one token alone is not looked at: it is what the model has chosen itself, and looking
    waits for the device.

    Raises:
        MelinoeError: with the first such id.
    """
    if not ids.numel() or (ids.device.type != "cpu" and ids.shape[-1] == 1):
        return
    if ids.numel() == 1:
        least = most = int(ids)
    else:
        least, most = (int(one) for one in torch.aminmax(ids))
    if least < 0 or most >= count:
        raise MelinoeError(
            "a token id is beyond the model's embeddings",
            got=least if least < 0 else most,
            allowed=f"0 to {count - 1}",
            next_step="use the tokenizer that belongs to this model: this one has more or other tokens",
        )


class _Checked:
    """A hook before a forward pass. How many ids there are is asked for each pass of more than one token."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = input_ids(args, kwargs)
        if ids is None:
            return
        if not self._count or ids.numel() > 1:
            self._count = len(model.get_input_embeddings().weight)  # type: ignore[operator]
        check_ids(ids, self._count)


def refuse_unknown_ids(model: nn.Module) -> None:
    """Checks the ids of every forward pass of a model from now on."""
    model.register_forward_pre_hook(_Checked(), with_kwargs=True)
