"""Linear layers outside of experts (attention's projections, the head) on the kernel for few rows."""

from __future__ import annotations

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


def few_rows_linears(model: nn.Module) -> list[nn.Module]:
    """Those of a model, whose forward is not torch's alone."""
    return [module for module in model.modules() if isinstance(module, FewRowsLinear)]
