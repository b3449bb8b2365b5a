"""Smaller experts: weights rounded to fewer bits in the record, widened again when they are used.

    bf16   bfloat16 in place of float32 or float64
    int8   symmetric, code = round(w / scale), -127 to 127
    int4   affine, code = round(w / scale) + zero, 0 to 15; two codes in a byte

Round to nearest, in groups of 64 along the input dimension; the last group may be shorter. Zero is always
exact, so a group of zeros stays zero and units that were pruned or added as zeros change nothing.
A packed field holds its codes, then one scale per group in the dtype of the weight (a code was chosen
for the scale as stored, so widening rounds once, in the product), then for int4 one zero point (a byte) per
group; each part starts at a multiple of 64 bytes. int4 puts element i and element i + half of the field
into byte i, so that unpacking writes two runs.

A matrix is seen as [outer, inputs, inner]: [O, I] is [O, I, 1] and the transposed [I, O] is [1, I, O].
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from melinoe.errors import MelinoeError

FORMATS = ("bf16", "int8", "int4")
GROUP = 64  # weights that share a scale
PART_ALIGNMENT = 64  # bytes


def check_format(name: str | None) -> None:
    """Raises MelinoeError for a name that is not a store format."""
    if name is not None and name not in FORMATS:
        raise MelinoeError("no such store format", got=name, allowed=", ".join(FORMATS))


def format_for(name: str | None, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """The format that a tensor of an expert gets: matrices only, and only where it makes them smaller."""
    if name is None or len(shape) != 2 or not dtype.is_floating_point:
        return ""
    if name == "bf16" and dtype.itemsize <= 2:
        return ""
    return name


def _aligned(count: int) -> int:
    return -(-count // PART_ALIGNMENT) * PART_ALIGNMENT


def _groups(shape: tuple[int, ...], axis: int) -> tuple[int, int, int, int]:
    """(outer, inputs, inner, groups)."""
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    return outer, shape[axis], inner, -(-shape[axis] // GROUP)


def _parts(name: str, shape: tuple[int, ...], dtype: torch.dtype, axis: int) -> tuple[int, int, int]:
    """Bytes of (codes, scales, zero points)."""
    count = math.prod(shape)
    if name == "bf16":
        return 2 * count, 0, 0
    outer, _, inner, groups = _groups(shape, axis)
    num_groups = outer * groups * inner
    if name == "int8":
        return count, num_groups * dtype.itemsize, 0
    return -(-count // 2), num_groups * dtype.itemsize, num_groups


def packed_bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype, axis: int) -> int:
    codes, scales, zeros = _parts(name, shape, dtype, axis)
    return (_aligned(codes) + _aligned(scales) + zeros) if scales else codes


def _spread(values: torch.Tensor, inputs: int) -> torch.Tensor:
    """[outer, groups, inner] -> [outer, inputs, inner]."""
    return values.repeat_interleave(GROUP, 1)[:, :inputs]


def _round_up_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 -> dtype, never smaller, so that the largest weight of a group still has a code."""
    rounded = values.to(dtype)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.double() < values.double(), above, rounded)


def pack(name: str, weight: torch.Tensor, axis: int, field: torch.Tensor) -> None:
    """Rounds `weight` into `field` ([packed_bytes] uint8).

    Raises:
        MelinoeError: the weight has values that are not finite.
    """
    shape, dtype = tuple(weight.shape), weight.dtype
    if not bool(torch.isfinite(weight).all()):
        raise MelinoeError(
            f"weights that are not finite cannot be stored as {name}", next_step="convert without --format"
        )
    code_bytes, scale_bytes, zero_bytes = _parts(name, shape, dtype, axis)
    codes = field[:code_bytes]
    if name == "bf16":
        codes.view(torch.bfloat16).copy_(weight.flatten())
        return
    outer, inputs, inner, groups = _groups(shape, axis)
    values = weight.float().reshape(outer, inputs, inner)
    # the last group is filled up with zeros, which every group's range includes anyway
    full = F.pad(values, (0, 0, 0, groups * GROUP - inputs)).view(outer, groups, GROUP, inner)
    low, high = full.amin(2).clamp_max(0), full.amax(2).clamp_min(0)
    steps = 127 if name == "int8" else 15
    scale = _round_up_to(
        torch.maximum(high, -low) / steps if name == "int8" else (high - low) / steps, dtype
    )
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float()  # a group of zeros
    rounded = (values / _spread(divisor, inputs)).round_()
    start = _aligned(code_bytes)
    field[start : start + scale_bytes].view(dtype).copy_(scale.flatten())
    if name == "int8":
        codes.view(torch.int8).copy_(rounded.clamp_(-127, 127).flatten())
        return
    zero = (-low / divisor).round_().clamp_(0, 15)
    start += _aligned(scale_bytes)
    field[start : start + zero_bytes].copy_(zero.flatten())
    nibbles = (rounded + _spread(zero, inputs)).clamp_(0, 15).to(torch.uint8).flatten()
    codes.copy_(nibbles[:code_bytes])
    codes[: len(nibbles) - code_bytes] |= nibbles[code_bytes:] << 4


def expand(name: str, field: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, axis: int) -> torch.Tensor:
    """The weight behind a packed field ([packed_bytes] uint8), in `dtype`; a new tensor on the same device."""
    code_bytes, scale_bytes, zero_bytes = _parts(name, shape, dtype, axis)
    codes = field[:code_bytes]
    if name == "bf16":
        return codes.view(torch.bfloat16).view(shape).to(dtype)
    outer, inputs, inner, groups = _groups(shape, axis)
    start = _aligned(code_bytes)
    scale = field[start : start + scale_bytes].view(dtype).view(outer, groups, inner)
    if name == "int8":
        whole = codes.view(torch.int8)
    else:
        start += _aligned(scale_bytes)
        zero = field[start : start + zero_bytes].view(torch.int8).view(outer, groups, inner)
        count = math.prod(shape)
        whole = torch.empty(count, dtype=torch.uint8, device=field.device)
        torch.bitwise_and(codes, 15, out=whole[:code_bytes])
        torch.bitwise_right_shift(codes[: count - code_bytes], 4, out=whole[code_bytes:])
        whole = whole.view(torch.int8)
    if inputs % GROUP == 0:
        grouped = whole.view(outer, groups, GROUP, inner)
        scale = scale.unsqueeze(2)
        zero = zero.unsqueeze(2) if name == "int4" else None
    else:
        grouped = whole.view(outer, inputs, inner)
        scale = _spread(scale, inputs)
        zero = _spread(zero, inputs) if name == "int4" else None
    if zero is not None:
        grouped.sub_(zero)
    return grouped.to(dtype).mul_(scale).view(shape)
