"""Codes and scales of int4 through native/fit_int4.c, with the bits that `rounding` has from torch.

The checksums of a store are of these bits, and torch adds up 64 numbers in an order that hangs on the
processor's vectors and on how a matrix lies. Which it is here, its sums say; then a tile of all kinds of rows
is compared. Where no order is torch's, or nothing can be compiled, torch does it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from melinoe.native import library

ORDERS = (16, 8, 4)  # partial sums side by side

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@cache
def _library() -> Any:
    found: Any = library.opened("fit_int4.c", contract=False)
    if found is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        found.melinoe_fit_int4.argtypes = [pointer, number, number, pointer, pointer, number, number]
        found.melinoe_fit_int4.restype = number
        found.melinoe_sums_of_64.argtypes = [pointer, number, pointer, number]
    return found


def fitted_tile(rows: torch.Tensor, codes: torch.Tensor, scale_GO2: torch.Tensor, by_torch: Write) -> bool:
    """Writes codes [in, outputs / 2] and scales [groups, outputs, 2] of rows [outputs, in], in groups of 64.

    Args:
        rows: float32, in their own strides: torch's order of sums hangs on them.
        by_torch: does the same; what it writes is what is to be written here.

    Returns:
        Whether it was done; if not, `by_torch` must do it.
    """
    if _library() is None or rows.device.type != "cpu" or codes.device.type != "cpu":
        return False
    if not codes.is_contiguous() or scale_GO2.stride()[1:] != (2, 1):
        return False
    order = _order(rows.shape, rows.stride(), by_torch)
    return order is not None and _fit(rows, codes, scale_GO2, order)


def _fit(rows: torch.Tensor, codes: torch.Tensor, scale_GO2: torch.Tensor, order: int) -> bool:
    rows, groups = rows.contiguous(), len(scale_GO2)
    places = rows.data_ptr(), len(rows), groups, codes.data_ptr(), scale_GO2.data_ptr()
    return not _library().melinoe_fit_int4(*places, scale_GO2.stride(0), order)


@cache
def _order(shape: tuple[int, int], strides: tuple[int, int], by_torch: Write) -> int | None:
    """The order of torch's sums for rows that lie so; None: none that we know."""
    rows = torch.empty_strided(shape, strides).copy_(_samples(*shape))
    wanted, found = _empty(*shape), _empty(*shape)
    by_torch(rows, *wanted)
    for order in ORDERS:
        if _sums_agree(rows, order) and _fit(rows, *found, order):
            same = (torch.equal(*pair) for pair in zip(_bits(wanted), _bits(found), strict=True))
            return order if all(same) else None
    return None


def _sums_agree(rows: torch.Tensor, order: int) -> bool:
    """Whether the order is torch's: rounding to codes and to bfloat16 would seldom show another one."""
    groups = rows.contiguous().view(-1, 64)
    sums = torch.empty(len(groups))
    _library().melinoe_sums_of_64(groups.data_ptr(), len(groups), sums.data_ptr(), order)
    by_torch = rows.unflatten(1, (-1, 64))
    return torch.equal(by_torch.sum(2, keepdim=True).flatten(), sums) and torch.equal(
        by_torch.mean(2, keepdim=True).flatten(), sums / 64
    )


def _samples(outputs: int, inputs: int) -> torch.Tensor:
    """Rows of the sizes that weights have, and of others; sums of 64 of them differ by their order."""
    rows = torch.randn(outputs, inputs // 64, 64, generator=torch.Generator().manual_seed(0))
    rows[:, 1::6] *= 1e-40  # denormal
    rows[:, 2::6] *= 1e18
    rows[:, 3::6, :-1] = 0
    rows[:, 4::6] = rows[:, 4::6].bfloat16().float()
    return rows.flatten(1)


def _empty(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(inputs, outputs // 2, dtype=torch.uint8)
    return codes, torch.empty(inputs // 64, outputs, 2, dtype=torch.bfloat16)


def _bits(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return pair[0], pair[1].view(torch.int16)
