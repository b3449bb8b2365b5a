"""Packed kernels: which of them this machine has, and what they compute.

Ours (`packed_rows`) where this machine has them, else torch's, whatever the number of rows.
They compute rows by a matrix of int8 or int4 codes as it lies, without weights of full size in between. Each
row is summed in the same order however many rows there are, so a row's result does not depend on its company.
What a machine has is found by asking the kernels, not by the processor's name: torch chooses among them when
it starts (ATEN_CPU_CAPABILITY), and the order of int4 codes changes with its choice.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from melinoe.store import packed_rows, rounding

# rows up to which a kernel is faster than expanding the matrix and multiplying; more are expanded. Fixed, and
# not measured where it runs: which kernel computes a row may not depend on a clock (docs/decisions)
FEW_ROWS = {"int8": 16, "int4": 32}
DTYPE = torch.bfloat16  # of rows and scales: the kernels want them alike


def usable(name: str, tile: int) -> bool:
    """Whether this machine computes codes of a format in this order; it compiles our kernels, if it can."""
    packed_rows.there()
    return _computes_int8() if name == "int8" else tile == machine_tile()


@cache
def machine_tile() -> int | None:
    """The order in which this machine's torch wants int4 codes (`rounding.TILES`); None: none we know."""
    return next((tile for tile in rounding.TILES if _agrees("int4", tile)), None)


@cache
def _computes_int8() -> bool:
    return _agrees("int8", 0)


def _agrees(name: str, tile: int) -> bool:
    """Whether the kernel gives what a small matrix stands for, weight by weight."""
    weight_OI = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    code_shape, scale_shape = rounding.shapes(name, 64, 64, tile)
    codes = torch.empty(code_shape, dtype=torch.int8 if name == "int8" else torch.uint8)
    scale, expanded_OI = torch.empty(scale_shape, dtype=DTYPE), torch.empty(64, 64)
    write, expand = rounding.by_torch(name)
    write(weight_OI, codes, scale)
    expand(codes, scale, expanded_OI)
    try:
        found = _torch_product(name, torch.eye(64, dtype=DTYPE), codes, scale, 64)
    except (AttributeError, NotImplementedError, RuntimeError):  # this torch has no such kernel
        return False
    return torch.allclose(found.float(), expanded_OI.T, rtol=2**-7, atol=0)


def product(
    name: str, rows: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, size_out: int
) -> torch.Tensor:
    """rows [N, in] by a packed matrix -> [N, out], in bfloat16, on the CPU.

    codes, scale: as `rounding` describes them, codes of int4 in the tiles of this machine; their shape is not
    looked at.
    """
    rows = _filled_up(rows)
    if _ours(name):
        return packed_rows.product(name, rows, (codes, scale), size_out)
    return _torch_product(name, rows, codes, scale, size_out)


def _filled_up(rows: torch.Tensor) -> torch.Tensor:
    missing = rounding.padded(rows.shape[1]) - rows.shape[1]
    return F.pad(rows, (0, missing)) if missing else rows.contiguous()


def _ours(name: str) -> bool:
    """Whether our kernels compute a format here: int4 codes lie as torch wants them."""
    return packed_rows.there() and (name == "int8" or machine_tile() == packed_rows.TILE)


def gated(
    name: str, rows: torch.Tensor, experts: list[tuple[packed_rows.Matrix, packed_rows.Matrix]], inner: int
) -> torch.Tensor | None:
    """Whole experts with silu on the same rows [N, hidden]; None where they are computed step by step.

    experts: of each, up [2 * inner, hidden], the gate's half first, and down [hidden, inner].

    Returns:
        [E * N, hidden], expert by expert; the bits that one expert alone has.
    """
    if not _ours(name):
        return None
    return packed_rows.gated(name, _filled_up(rows), experts, rows.shape[1], inner)


def gated_function(name: str, hidden: int, inner: int) -> tuple[Any, int] | None:
    """The library's function that computes `gated`, and the bits of a code, where one thread does."""
    found = packed_rows.gated_function(hidden, inner) if _ours(name) else None
    return None if found is None else (found, packed_rows.BITS[name])


def _torch_product(
    name: str, rows: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, size_out: int
) -> torch.Tensor:
    if name == "int8":
        return torch.ops.aten._weight_int8pack_mm(rows, codes, scale)
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows, codes.view(scale.shape[1], -1), rounding.GROUP, scale
    )
    return out if out.shape[1] == size_out else out[:, :size_out]
