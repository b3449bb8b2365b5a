"""The expert record: every tensor of one expert, contiguous, in one padded block of bytes.

The layout follows from the experts module's own parameters (all have one row per expert in dimension
0), so biases, transposed and gate-less experts need no special code. Fields start at multiples of 64
bytes, records at multiples of 4 KiB: one read, or one copy, moves one expert. A field may be packed into
fewer bits (formats.py); it is widened each time it is looked up.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from melinoe.config import RECORD_ALIGNMENT
from melinoe.offload import formats

FIELD_ALIGNMENT = 64  # bytes; what vector instructions like


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class Field:
    """One tensor of a record. shape: without the expert dimension; dtype: torch's name; offset in bytes.

    format: how it is packed, "" if it is not; input_axis: the dimension along which groups run.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    format: str = ""
    input_axis: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes in the record."""
        if self.format:
            return formats.packed_bytes(self.format, self.shape, torch_dtype(self.dtype), self.input_axis)
        return self.plain_bytes

    @property
    def plain_bytes(self) -> int:
        """Bytes of the tensor as it is computed with."""
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    assert isinstance(dtype, torch.dtype), name
    return dtype


class RecordViews(dict[str, torch.Tensor]):
    """The tensors of one record by name. Plain ones share its memory; packed ones are made at each look-up."""

    def __init__(self, plain: dict[str, torch.Tensor], packed: dict[str, tuple[Field, torch.Tensor]]) -> None:
        super().__init__(plain)
        self._packed = packed

    def __missing__(self, name: str) -> torch.Tensor:
        field, data = self._packed[name]
        return formats.expand(field.format, data, field.shape, torch_dtype(field.dtype), field.input_axis)


@dataclass(frozen=True)
class RecordLayout:
    """Where each tensor of an expert stands in its record."""

    fields: tuple[Field, ...]
    record_bytes: int  # with padding

    @classmethod
    def of(cls, module: nn.Module, format: str | None = None) -> RecordLayout:
        """The layout of an experts module whose parameters are still there (meta tensors will do).

        Args:
            format: one of `formats.FORMATS` for the matrices; None: everything as it is.
        """
        fields, offset = [], 0
        for name, parameter in module.named_parameters(recurse=False):
            assert parameter.shape[0] == module.num_experts, (name, parameter.shape)
            shape = tuple(parameter.shape[1:])
            field = Field(
                name,
                shape,
                str(parameter.dtype).removeprefix("torch."),
                offset,
                formats.format_for(format, shape, parameter.dtype),
                0 if module.is_transposed else 1,
            )
            fields.append(field)
            offset = _round_up(offset + field.nbytes, FIELD_ALIGNMENT)
        return cls(tuple(fields), _round_up(offset, RECORD_ALIGNMENT))

    @property
    def data_bytes(self) -> int:
        """Bytes that carry weights, without padding."""
        return sum(field.nbytes for field in self.fields)

    @property
    def plain_bytes(self) -> int:
        """Bytes of the tensors as they are computed with."""
        return sum(field.plain_bytes for field in self.fields)

    @property
    def expansion_bytes(self) -> int:
        """Memory that widening the largest packed field takes while it is used: codes and result; 0 if none is."""
        return max((2 * field.plain_bytes for field in self.fields if field.format), default=0)

    def same_tensors(self, other: RecordLayout) -> bool:
        """Whether both hold tensors of the same names, shapes and dtypes, packed or not."""
        own, others = (
            [(field.name, field.shape, field.dtype) for field in layout.fields] for layout in (self, other)
        )
        return own == others

    def views(self, record: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors inside one record ([record_bytes] uint8); those that are not packed share its memory."""
        plain, packed = {}, {}
        for field in self.fields:
            data = record[field.offset : field.offset + field.nbytes]
            if field.format:
                packed[field.name] = (field, data)
            else:
                plain[field.name] = data.view(torch_dtype(field.dtype)).view(field.shape)
        return RecordViews(plain, packed) if packed else plain

    def write(self, record: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
        """Puts one tensor of an expert into its record, packed where the layout says so.

        Raises:
            MelinoeError: it is to be packed and has values that are not finite.
        """
        [field] = [field for field in self.fields if field.name == name]
        data = record[field.offset : field.offset + field.nbytes]
        if field.format:
            formats.pack(field.format, tensor, field.input_axis, data)
        else:
            data.view(torch_dtype(field.dtype)).view(field.shape).copy_(tensor)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RecordLayout:
        fields = tuple(
            Field(
                f["name"], tuple(f["shape"]), f["dtype"], f["offset"], f.get("format", ""), f.get("input_axis", 1)
            )
            for f in data["fields"]
        )
        return cls(fields, data["record_bytes"])
