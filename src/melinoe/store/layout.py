"""The expert record: every tensor of one expert, contiguous, in one padded block of bytes.

The layout follows from the experts module's own parameters (experts stand in dimension 0), so biases,
transposed and gate-less experts need no special code. Fields start at multiples of 64 bytes, records at
multiples of 4 KiB: one read, or one copy, moves one expert.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from melinoe.config import RECORD_ALIGNMENT
from melinoe.models.layers import per_expert

FIELD_ALIGNMENT = 64  # bytes; what vector instructions like


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class Field:
    """One tensor of a record.

    shape: without the dimension of experts. dtype: torch's name of it. offset: in bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * torch_dtype(self.dtype).itemsize


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    assert isinstance(dtype, torch.dtype), name
    return dtype


@dataclass(frozen=True)
class RecordLayout:
    """Where each tensor of an expert stands in its record."""

    fields: tuple[Field, ...]
    record_bytes: int  # with padding

    @classmethod
    def of(cls, module: nn.Module, dtypes: dict[str, str] | None = None) -> RecordLayout:
        """The layout of an experts module whose parameters are still there (meta tensors will do).

        dtypes: of some fields, instead of the module's own.
        """
        dtypes = dtypes or {}
        return cls.build(
            [
                (
                    name,
                    tuple(per_expert(parameter, int(module.num_experts)).shape[1:]),  # type: ignore[arg-type]
                    dtypes.get(name, str(parameter.dtype).removeprefix("torch.")),
                )
                for name, parameter in module.named_parameters(recurse=False)
            ]
        )

    @classmethod
    def build(cls, tensors: list[tuple[str, tuple[int, ...], str]]) -> RecordLayout:
        """The layout of (name, shape, dtype), one after the other."""
        fields, offset = [], 0
        for name, shape, dtype in tensors:
            field = Field(name, shape, dtype, offset)
            fields.append(field)
            offset = _round_up(offset + field.nbytes, FIELD_ALIGNMENT)
        return cls(tuple(fields), _round_up(offset, RECORD_ALIGNMENT))

    @property
    def data_bytes(self) -> int:
        """Bytes that carry weights, without padding."""
        return sum(field.nbytes for field in self.fields)

    def views(self, record: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors inside one record ([record_bytes] uint8), sharing its memory."""
        return {
            field.name: record[field.offset : field.offset + field.nbytes]
            .view(torch_dtype(field.dtype))
            .view(field.shape)
            for field in self.fields
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RecordLayout:
        fields = tuple(Field(f["name"], tuple(f["shape"]), f["dtype"], f["offset"]) for f in data["fields"])
        return cls(fields, data["record_bytes"])
