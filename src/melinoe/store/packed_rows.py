"""Few bfloat16 rows by int8 and int4 codes through native/packed_rows.c, where this machine can.

It takes two thirds of the time of torch's packed kernels: it asks memory for what comes next, and multiplies
four bytes at a time (docs/log.md). Whole experts are one call.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from melinoe.native import library
from melinoe.store import rounding

TILE = 64  # of int4 codes: the only order that it reads
LARGE = 2**20  # weights from which on a matrix is divided among torch's number of threads
Matrix = tuple[torch.Tensor, torch.Tensor]  # codes and scales, as `rounding` has them

BITS = {"int8": 8, "int4": 4}


@cache
def _library() -> Any:
    """The compiled kernels; None: they cannot be had, this processor lacks the instructions, or they err."""
    found: Any = library.opened("packed_rows.c")
    if found is None or not found.melinoe_packed_there():
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.melinoe_packed_product.argtypes = [pointer] * 4 + [number] * 6
    found.melinoe_packed_gated.argtypes = [pointer] * 3 + [number] * 6
    found.melinoe_packed_gate.argtypes = [pointer] * 2 + [number] * 3
    return found if all(_agrees(found, name) for name in BITS) else None


def _agrees(found: Any, name: str) -> bool:
    """Whether a small matrix gives what it stands for."""
    generator = torch.Generator().manual_seed(0)
    weight_OI, rows = torch.randn(70, 128, generator=generator), torch.randn(3, 128, generator=generator)
    code_shape, scale_shape = rounding.shapes(name, 70, 128, TILE)
    codes = torch.empty(code_shape, dtype=torch.int8 if name == "int8" else torch.uint8)
    scale, expanded_OI = torch.empty(scale_shape, dtype=torch.bfloat16), torch.empty(weight_OI.shape)
    write, expand = rounding.by_torch(name)
    write(weight_OI, codes, scale)
    expand(codes, scale, expanded_OI)
    rows = rows.bfloat16()
    computed = _product(found, name, rows, (codes, scale), len(weight_OI)).double()
    return torch.allclose(computed, rows.double() @ expanded_OI.double().T, rtol=2**-7, atol=2**-7)


def there() -> bool:
    """Whether this machine has the kernels; the first call compiles them. It holds for the process."""
    return _library() is not None


def product(name: str, rows: torch.Tensor, matrix: Matrix, size_out: int) -> torch.Tensor:
    """rows [N, in filled up to 64] by a packed matrix -> [N, out]; all bfloat16, on the CPU, contiguous.

    Where they are `there`. Raises MemoryError.
    """
    return _product(_library(), name, rows, matrix, size_out)


def _product(found: Any, name: str, rows: torch.Tensor, matrix: Matrix, size_out: int) -> torch.Tensor:
    out = rows.new_empty(len(rows), size_out)
    tensors = rows, *matrix, out
    given = *(tensor.data_ptr() for tensor in tensors), *rows.shape, size_out

    def compute(first: int, last: int) -> int:
        return int(found.melinoe_packed_product(*given, first, last, BITS[name]))

    library.in_parts(compute, size_out, TILE, _threads(rows.shape[1] * size_out))
    return out


def _threads(weights: int) -> int:
    """How many share a matrix of so many weights."""
    return torch.get_num_threads() if weights >= LARGE else 1


def gated_function(hidden: int, inner: int) -> Any:
    """The library's function that computes `gated`; None where several threads share it, or fill rows up."""
    alone = hidden == rounding.padded(hidden) and _threads(2 * inner * hidden) == 1
    return _library().melinoe_packed_gated if there() and alone else None


def gated(
    name: str, rows: torch.Tensor, experts: list[tuple[Matrix, Matrix]], hidden: int, inner: int
) -> torch.Tensor:
    """Whole experts with silu on the same rows: down(silu(gate(x)) * up(x)).

    Several threads share the experts, or each matrix where there are too few.

    Args:
        rows: as for `product`.
        experts: of each, up [2 * inner, hidden], the gate's half first, and down [hidden, inner].

    Returns:
        [E * N, hidden], expert by expert.

    Raises:
        MemoryError: no memory for a row.
    """
    threads = _threads(2 * inner * rows.shape[1])
    if len(experts) < threads:  # each matrix is divided, with the same bits
        return torch.cat([_one_gated(name, rows, *each, hidden, inner) for each in experts])
    out, count = rows.new_empty(len(experts) * len(rows), hidden), len(rows)
    weights = [[tensor.data_ptr() for tensor in (*up, *down)] for up, down in experts]

    def compute(first: int, last: int) -> int:
        these = [pointer for each in weights[first:last] for pointer in each]
        given = rows.data_ptr(), (ctypes.c_void_p * len(these))(*these), out[first * count :].data_ptr()
        shape = last - first, *rows.shape, hidden, inner, BITS[name]
        return int(_library().melinoe_packed_gated(*given, *shape))

    library.in_parts(compute, len(experts), 1, threads)
    return out


def _one_gated(
    name: str, rows: torch.Tensor, up: Matrix, down: Matrix, hidden: int, inner: int
) -> torch.Tensor:
    both, act = product(name, rows, up, 2 * inner), rows.new_zeros(len(rows), rounding.padded(inner))
    _library().melinoe_packed_gate(both.data_ptr(), act.data_ptr(), len(rows), inner, act.shape[1])
    return product(name, act, down, hidden)
