"""Packed records as melinoe wrote them before they lay in a kernel's form: read, and no longer written.

One matrix is codes and a scale for each group of 64 weights along its input dimension (the one that is summed
over, so dimension 0 of transposed experts); w' = code * scale, rounded once to the model's dtype.

    int8  codes -127..127, the shape of the matrix
    int4  codes -8..7 stored as code + 8, two per byte along the input dimension; the bytes of a group of
          length n are h = ceil(n / 2), byte j has code j in its low four bits and code h + j in its high ones

Scales are bfloat16; torch has no kernel for these groups, so such records are expanded at each use.
"""

from __future__ import annotations

import torch

GROUP = 64
_BLOCK = 2**18  # weights expanded at a time: codes on their way stay in the processor's cache


def shapes(name: str, shape: tuple[int, ...], dimension: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a matrix's codes and scales. dimension: of the inputs."""
    size = shape[dimension]
    codes, scales = list(shape), list(shape)
    whole = size // GROUP * (GROUP // 2) + -(-(size % GROUP) // 2)
    codes[dimension] = size if name == "int8" else whole
    scales[dimension] = -(-size // GROUP)
    return tuple(codes), tuple(scales)


def expand(name: str, codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, dimension: int) -> None:
    """Writes what codes and scales stand for into a matrix."""
    for values, scales, packed in _groups(name, weight, scale, codes, dimension):
        _dequantise(values, scales, packed, name, dimension + 1)


def _groups(
    name: str, weight: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, dimension: int
) -> list[tuple[torch.Tensor, ...]]:
    """(weights, scales, codes) of the whole groups, and of the last shorter one if there is one; views.

    Each has 3 dimensions, [out, groups, in a group] or, transposed, [groups, in a group, out].
    """
    whole = weight.shape[dimension] // GROUP
    lengths = (GROUP, 1, GROUP if name == "int8" else GROUP // 2)
    found = []
    for first in (True, False):
        views = []
        for tensor, length in zip((weight, scale, codes), lengths, strict=True):
            end = whole * length
            start, count = (0, end) if first else (end, tensor.shape[dimension] - end)
            groups = whole if first else 1
            if count:
                part = tensor.narrow(dimension, start, count)
                views.append(part.unflatten(dimension, (groups, count // groups)))
        if views:
            found.append(tuple(views))
    return found


def _dequantise(
    values: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, name: str, dimension: int
) -> None:
    """values = codes * scale, a block at a time.

    A code fits every floating dtype, so only the product rounds.
    """
    step = max(1, _BLOCK // values[0].numel())
    half, length = codes.shape[dimension], values.shape[dimension]
    space = None
    for start in range(0, len(values), step):
        out, packed = values[start : start + step], codes[start : start + step]
        if name == "int8":
            out.copy_(packed)
        else:
            if space is None:
                space = torch.empty(out.shape, dtype=torch.uint8, device=out.device)
            nibbles = space[: len(out)]
            torch.bitwise_and(packed, 15, out=nibbles.narrow(dimension, 0, half))
            torch.bitwise_right_shift(
                packed.narrow(dimension, 0, length - half), 4,
                out=nibbles.narrow(dimension, half, length - half),
            )  # fmt: skip
            out.copy_(nibbles.view(torch.int8).sub_(8))
        out.mul_(scale[start : start + step])
