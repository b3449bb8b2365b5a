"""Few bfloat16 rows by a matrix at the speed of memory, where the machine has a C compiler.

torch hands such a product to oneDNN, which takes 13 microseconds before it begins, and on some processors
reads weights at a quarter of the memory's speed.

Which kernel computes a row is a matter of the number of rows, of dtype, shapes and threads alone, for paged
and resident experts alike. Without a compiler, or with MELINOE_COMPILED=0, all of it is torch's.
"""

from __future__ import annotations

import ctypes
import itertools
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import activations
from transformers.integrations import moe

from melinoe.native import library

FEW_ROWS = 8  # more are torch's, whose matrix instructions win from about six on (docs/log.md)
FEW_SMALL, SMALL = 16, 2**19  # rows by a matrix of fewer weights, where torch wins from about 16 on
LARGE = 2**20  # weights from which on a matrix is divided among torch's number of threads

_library: Any = None  # once it was asked for and has been found to compute what it should
_asked = False


def prepare() -> bool:
    """Compiles the kernels, or finds them compiled; whether they are there.

    Called where a model is opened, so that no token waits for it. What it found holds for the process.
    """
    global _library, _asked
    if not _asked:
        _library, _asked = _found(), True
        library.opened("program.c")  # of recorded steps, compiled with the others
    return _library is not None


def _found() -> Any:
    found: Any = library.opened("few_rows.c")
    if found is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.melinoe_product.argtypes = [pointer] * 3 + [number] * 5
    found.melinoe_gated.argtypes = [pointer] * 4 + [number] * 4
    found.melinoe_gate.argtypes = [pointer] * 2 + [number] * 2
    found.melinoe_gated_rows.argtypes = [pointer] * 6 + [number] * 5
    rows, weight = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(3, 3, dtype=torch.bfloat16)
    found.melinoe_product(rows.data_ptr(), weight.data_ptr(), out.data_ptr(), 3, 70, 3, 0, 3)
    expected = rows.double() @ weight.double().T
    return found if torch.allclose(out.double(), expected, rtol=2**-7, atol=2**-5) else None


def few(rows: torch.Tensor) -> bool:
    """Whether rows [N, in] are such as the kernels compute, where the matrix is."""
    return (
        _library is not None
        and 0 < len(rows) <= FEW_SMALL
        and rows.dtype == torch.bfloat16
        and rows.device.type == "cpu"
        and not (rows.requires_grad and torch.is_grad_enabled())
        and rows.is_contiguous()
    )


def few_rows(module: nn.Module, hidden: torch.Tensor) -> int:
    """Up to so many rows of an experts module need not be rounded up in number; 0: torch computes all.

    hidden: of which they are rows.
    """
    own_way = module.is_transposed or "expert_forward" in vars(module)
    return FEW_ROWS if few(hidden[:1]) and not own_way else 0


def _fits(rows: int, weight: torch.Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and (rows <= FEW_ROWS or weight.numel() < SMALL)
        and weight.is_contiguous()
        and not (weight.requires_grad and torch.is_grad_enabled())
    )


def _threads(weight: torch.Tensor) -> int:
    return torch.get_num_threads() if weight.numel() >= LARGE else 1


def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """rows [N, in], for which `few` is true, by a matrix [out, in] -> [N, out]; None where it is torch's."""
    if not _fits(len(rows), weight):
        return None
    (count, size_in), size_out = rows.shape, len(weight)
    out = rows.new_empty(count, size_out)
    given = rows.data_ptr(), weight.data_ptr(), out.data_ptr(), count, size_in, size_out
    library.in_parts(partial(_library.melinoe_product, *given), size_out, 4, _threads(weight))
    return out


def product_function(rows: torch.Tensor, weights: list[torch.Tensor]) -> Any:
    """The library's function that computes `product` of these; None where it is torch's or is divided."""
    here = few(rows) and all(_fits(len(rows), weight) and _threads(weight) == 1 for weight in weights)
    return _library.melinoe_product if here else None


def gated_function(rows: torch.Tensor, weights: list[torch.Tensor]) -> Any:
    """The library's function that computes `gated` of these; None where it is torch's or is divided."""
    here = few(rows) and all(_fits(len(rows), weight) for weight in weights) and _threads(weights[0]) == 1
    return _library.melinoe_gated if here else None


def gated(rows: torch.Tensor, ups: list[torch.Tensor], downs: list[torch.Tensor]) -> torch.Tensor | None:
    """Whole experts with silu on the same rows [N, H], for which `few` is true; None: step by step.

    ups: [2 * I, H] of each of E experts, the gate's half first. downs: [H, I].

    Returns:
        [E * N, H], expert by expert.
    """
    if not all(_fits(len(rows), weight) for weight in (*ups, *downs)):
        return None
    threads = _threads(ups[0])
    if len(ups) < threads:  # each matrix is divided, with the same bits
        return torch.cat([_one_gated(rows, *each) for each in zip(ups, downs, strict=True)])
    (count, hidden), inner, experts = rows.shape, downs[0].shape[1], len(ups)
    out = rows.new_empty(experts * count, hidden)
    up, down = ([weight.data_ptr() for weight in weights] for weights in (ups, downs))

    def compute(first: int, last: int) -> int:
        pointers, into = ctypes.c_void_p * (last - first), out[first * count :]
        these = pointers(*up[first:last]), pointers(*down[first:last])
        given = rows.data_ptr(), *these, into.data_ptr(), last - first, count, hidden, inner
        return int(_library.melinoe_gated(*given))

    library.in_parts(compute, experts, 1, threads)
    return out


def takes_rows(rows: int, up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether `gated_rows` computes an expert on so many of the rows for which `few` is true."""
    return rows <= FEW_SMALL and _fits(rows, up) and _fits(rows, down)


def gated_rows(
    hidden_TH: torch.Tensor,
    choices: list[torch.Tensor],
    ups: list[torch.Tensor],
    downs: list[torch.Tensor],
    outputs_NH: torch.Tensor,
) -> None:
    """Whole experts with silu, each on rows of its own, to the bits of `gated`; `takes_rows` is true of each.

    Args:
        hidden_TH: contiguous; `few` is true of a row of it.
        choices: of each expert the places of its rows in outputs_NH, int64; `N // T` of them have one input.
        outputs_NH: contiguous, written at these places.
    """
    (tokens, hidden), inner = hidden_TH.shape, downs[0].shape[1]
    chosen, starts = torch.cat(choices), [0, *itertools.accumulate(len(one) for one in choices)]
    experts, top_k = len(choices), len(outputs_NH) // tokens
    pointers, numbers = ctypes.c_void_p * experts, ctypes.c_int64 * (experts + 1)
    given = (
        hidden_TH.data_ptr(),
        chosen.data_ptr(),
        numbers(*starts),
        pointers(*[weight.data_ptr() for weight in ups]),
        pointers(*[weight.data_ptr() for weight in downs]),
        outputs_NH.data_ptr(),
        top_k,
        hidden,
        inner,
    )
    library.in_parts(partial(_library.melinoe_gated_rows, *given), experts, 1, _threads(ups[0]))


def _one_gated(rows: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    both, act = product(rows, up), rows.new_empty(len(rows), down.shape[1])
    assert both is not None
    _library.melinoe_gate(both.data_ptr(), act.data_ptr(), *act.shape)
    out = product(act, down)
    assert out is not None
    return out


def is_gated_silu(module: nn.Module) -> bool:
    """Whether an expert is down(silu(gate(x)) * up(x)) of matrices [out, in]; of an experts module."""
    default = getattr(moe, "_default_apply_gate", None)
    gate = vars(module).get("_apply_gate", getattr(type(module), "_apply_gate", None))
    silu = type(getattr(module, "act_fn", None)) in (nn.SiLU, activations.SiLUActivation)
    plain = not (module.has_bias or module.is_transposed or module.has_post_expert_norm)
    return bool(silu and plain and module.has_gate and gate is not None and gate is default)
