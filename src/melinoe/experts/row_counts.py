"""Few different numbers of rows, where each costs a kernel of its own.

For bfloat16 and float16 on a CPU torch calls oneDNN, which writes and keeps code for every shape of a matrix
product: 1 to 2 ms and 0.7 MiB for each (docs/decisions/0014). A prompt gives every expert another number of
rows, so we round it up. A row's result does not depend on the rows beside it, only on how many there are.
"""

from __future__ import annotations

import torch

from melinoe.machine import makes_kernels


def padded(rows: int) -> int:
    """The number of rows that so many are computed with: a power of two up to 16, then at most an eighth more
    or 15 more.
    """
    if rows <= 16:
        return 1 << (rows - 1).bit_length()
    step = max(16, 1 << (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def row_counts(most: int) -> int:
    """How many values `padded` takes for 1 to `most` rows."""
    found, rows = 0, 1
    while rows <= most:
        found, rows = found + 1, padded(rows) + 1
    return found


def pad(positions: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[n] -> [padded(n)]: places of rows of `like`, place 0 once more for each that is filled in.

    As they are where shapes cost nothing.
    """
    rows = len(positions)
    more = padded(rows) - rows if makes_kernels(like.device, like.dtype) else 0
    return torch.nn.functional.pad(positions, (0, more)) if more else positions
