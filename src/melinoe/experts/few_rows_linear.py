"""Linear layers outside of experts (attention's projections, the head) on the kernel for few rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from melinoe.experts import compiled

LARGE = 2**12  # weights; a call of its own in a recorded step costs more than a smaller matrix


class FewRowsLinear(nn.Linear):
    """torch's linear layer without a bias, but for few bfloat16 rows, which the compiled kernel computes.

    It is a linear layer put in its place under its name: same parameters, same state dict.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        size_in = input.shape[-1]
        if input.numel() <= compiled.FEW_SMALL * size_in and not _traced():
            rows = input.reshape(-1, size_in)
            found = compiled.product(rows, self.weight) if compiled.few(rows) else None
            if found is not None:
                return found.view(*input.shape[:-1], -1)
        return super().forward(input)


def _traced() -> bool:
    """What torch writes down to call again knows only torch's functions."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def use_few_rows_linears(model: nn.Module) -> None:
    """Makes the large ones among a model's linear layers `FewRowsLinear`; subclasses stay what they are."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None and module.weight.numel() >= LARGE:
            module.__class__ = FewRowsLinear


def use_adjacent_outputs(model: nn.Module) -> None:
    """Makes the output layer see rows that lie behind each other.

    Behind a batch of prompts a model cuts the last hidden state of each out of [B, S, H]. torch does not fold
    such an input into rows where the weight asks for no gradient: bfloat16 goes through a loop that takes
    hundreds of times as long (11 s for 8 rows by 50,304 outputs); float32 is rounded differently.
    """
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is not None and adjacent not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(adjacent)


def adjacent(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The pre-hook of `use_adjacent_outputs`."""
    if not args or args[0].is_contiguous():
        return None
    return args[0].contiguous(), *args[1:]


def few_rows_linears(model: nn.Module) -> list[nn.Module]:
    """Those of a model, whose forward is not torch's alone."""
    return [module for module in model.modules() if isinstance(module, FewRowsLinear)]
