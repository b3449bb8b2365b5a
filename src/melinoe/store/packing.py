"""Smaller experts: matrices as int8 or int4 codes with one scale per group, and back.

A matrix of an expert is rounded to nearest in groups of 64 weights along its input dimension (the one
that is summed over, so dimension 0 of transposed experts); w' = code * scale. Biases stay as they are.

    int8  codes -127..127, scale = max |w| / 127
    int4  codes -8..7; the scale's sign puts the larger side of the group on the negative codes, and
          |scale| = max(larger / 8, smaller / 7.5), so that all sixteen codes are used

Scales are bfloat16, rounded away from zero: no weight falls out of the range, so |w - w'| <= |scale| / 2.
A code has at most 8 bits and so has a scale: their product is exact in float32, and w' is that product
rounded once to the model's dtype. So expanding gives the same bits on any device, in any order, at any
alignment. docs/results.md has what was measured in choosing this, docs/store.md the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from melinoe.errors import MelinoeError
from melinoe.store.layout import Field, RecordLayout, torch_dtype

FORMATS = ("auto", "int8", "int4")
GROUP = 64  # weights that share a scale
SCALE = ".scale"  # what a scale's name adds to its matrix's
_BLOCK = 2**18  # weights expanded at a time: codes on their way stay in the processor's cache

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Packing:
    """How the matrices of one layer's records are packed.

    format: int8 or int4. transposed: the matrices are [in, out], not [out, in]. expanded: the layout of the
    module's own parameters.
    """

    format: str
    transposed: bool
    expanded: RecordLayout

    def record_layout(self) -> RecordLayout:
        """The layout of a packed record: where a matrix stood, its codes and then its scales."""
        fields: list[tuple[str, tuple[int, ...], str]] = []
        for field in self.expanded.fields:
            if not _is_matrix(field):
                fields.append((field.name, field.shape, field.dtype))
                continue
            size = field.shape[self._dimension]
            codes, scales = list(field.shape), list(field.shape)
            codes[self._dimension] = size if self.format == "int8" else _int4_bytes(size)
            scales[self._dimension] = -(-size // GROUP)
            fields.append((field.name, tuple(codes), "int8" if self.format == "int8" else "uint8"))
            fields.append((field.name + SCALE, tuple(scales), "bfloat16"))
        return RecordLayout.build(fields)

    @torch.no_grad()
    def pack(self, weights: Tensors, packed: Tensors) -> None:
        """Rounds the tensors of one expert into the views of a packed record.

        Raises:
            MelinoeError: a weight is not finite, or so large that its dtype could not hold the rounded one.
        """
        for field in self.expanded.fields:
            if not _is_matrix(field):
                packed[field.name].copy_(weights[field.name])
                continue
            _check_range(weights[field.name], f"{field.name} as {self.format}")
            for values, scale, codes in self._groups(field, weights, packed):
                _quantise(values, scale, codes, self.format, self._dimension + 1)

    @torch.no_grad()
    def expand(self, packed: Tensors, weights: Tensors) -> None:
        """The inverse of `pack`: writes what a packed record stands for into the tensors of one expert."""
        for field in self.expanded.fields:
            if not _is_matrix(field):
                weights[field.name].copy_(packed[field.name])
                continue
            for values, scale, codes in self._groups(field, weights, packed):
                _dequantise(values, scale, codes, self.format, self._dimension + 1)

    @property
    def _dimension(self) -> int:
        return 0 if self.transposed else 1

    def _groups(self, field: Field, weights: Tensors, packed: Tensors) -> list[tuple[torch.Tensor, ...]]:
        """(weights, scales, codes) of the whole groups, and of the last shorter one if there is one; views.

        Each has 3 dimensions, [out, groups, in a group] or, transposed, [groups, in a group, out].
        """
        dimension = self._dimension
        whole = field.shape[dimension] // GROUP
        lengths = (GROUP, 1, GROUP if self.format == "int8" else GROUP // 2)
        tensors = (weights[field.name], packed[field.name + SCALE], packed[field.name])
        found = []
        for first in (True, False):
            views = []
            for tensor, length in zip(tensors, lengths, strict=True):
                end = whole * length
                start, count = (0, end) if first else (end, tensor.shape[dimension] - end)
                groups = whole if first else 1
                if count:
                    part = tensor.narrow(dimension, start, count)
                    views.append(part.unflatten(dimension, (groups, count // groups)))
            if views:
                found.append(tuple(views))
        return found

    def to_json(self) -> dict[str, Any]:
        expanded = self.expanded.to_json()
        return {"format": self.format, "group": GROUP, "transposed": self.transposed, "expanded": expanded}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Packing:
        """Raises MelinoeError for a format that this version does not know."""
        if data["format"] not in FORMATS[1:] or data["group"] != GROUP:
            raise MelinoeError(
                "unknown format of records",
                got=f"{data['format']} in groups of {data['group']}",
                allowed=f"{', '.join(FORMATS)}; groups of {GROUP}",
                next_step="convert again with this version of melinoe",
            )
        return cls(data["format"], data["transposed"], RecordLayout.from_json(data["expanded"]))


def check_format(name: str) -> None:
    """Raises MelinoeError where there is no such store format."""
    if name not in FORMATS:
        raise MelinoeError("unknown store format", got=name, allowed=", ".join(FORMATS))


def packing_of(name: str, layout: RecordLayout, transposed: bool) -> Packing | None:
    """How records of a layout are packed in a store format; None for `auto`, which packs nothing."""
    return None if name == "auto" else Packing(name, transposed, layout)


def _is_matrix(field: Field) -> bool:
    return len(field.shape) == 2 and torch_dtype(field.dtype).is_floating_point


def _int4_bytes(size: int) -> int:
    """Bytes of one row of codes: 32 for a whole group, half the length rounded up for a last shorter one."""
    return size // GROUP * (GROUP // 2) + -(-(size % GROUP) // 2)


def _check_range(weight: torch.Tensor, what: str) -> None:
    limit = min(torch.finfo(weight.dtype).max, torch.finfo(torch.bfloat16).max) / 2
    largest = float(weight.float().abs().max())
    if not largest < limit:  # also for nan
        raise MelinoeError(
            f"cannot round {what}",
            got=f"a weight of size {largest}",
            allowed=f"below {limit:.3g}",
            next_step="use --format auto, or mend the checkpoint",
        )


def _away_from_zero(values: torch.Tensor) -> torch.Tensor:
    """The nearest bfloat16 that is not smaller; values: float32, not negative."""
    rounded = values.to(torch.bfloat16)
    smaller = rounded.float() < values
    return (rounded.view(torch.int16) + smaller).view(torch.bfloat16)


def _quantise(
    values: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, name: str, dimension: int
) -> None:
    weights = values.float()
    if name == "int8":
        lowest, highest = -127, 127
        found = _away_from_zero(weights.abs().amax(dimension, keepdim=True) / 127)
    else:
        lowest, highest = -8, 7
        above = weights.amax(dimension, keepdim=True).clamp_min(0)
        below = -weights.amin(dimension, keepdim=True).clamp_max(0)
        size = torch.maximum(torch.maximum(above, below) / 8, torch.minimum(above, below) / 7.5)
        found = _away_from_zero(size) * torch.where(above > below, -1.0, 1.0).to(torch.bfloat16)
    scale.copy_(found)
    divisor = torch.where(found == 0, torch.ones_like(found), found).float()
    rounded = (weights / divisor).round_().clamp_(lowest, highest)
    if name == "int8":
        codes.copy_(rounded)
        return
    nibbles = (rounded + 8).to(torch.uint8)
    half, length = codes.shape[dimension], values.shape[dimension]
    codes.copy_(nibbles.narrow(dimension, 0, half))
    codes.narrow(dimension, 0, length - half).add_(nibbles.narrow(dimension, half, length - half) << 4)


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
