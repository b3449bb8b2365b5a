"""Smaller experts: the matrices of a record as int8 or int4 codes with scales; biases stay as they are.

`rounding` says how a matrix becomes codes, and in which order their bytes lie: as torch's packed kernels read
them (`kernels`), so that a record that was read can be computed as it is. Stores of before have another form,
which is only read (`grouped`). docs/store.md has the bytes, docs/results.md what the formats cost in quality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from melinoe.errors import MelinoeError
from melinoe.store import grouped, rounding
from melinoe.store.kernels import machine_tile
from melinoe.store.layout import Field, RecordLayout, torch_dtype

FORMATS = ("auto", "int8", "int4")
FORMS = ("kernel", "grouped")  # what is written, and what stores of before hold
SCALE = ".scale"  # what a scale's name adds to its matrix's

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Packing:
    """How the matrices of one layer's records are packed.

    format: int8 or int4. transposed: the matrices of the module are [in, out], not [out, in]. expanded: the
    layout of the module's own parameters. form: kernel or grouped. tile: of int4 codes in the kernel's form
    (melinoe.store.rounding), else 0.
    """

    format: str
    transposed: bool
    expanded: RecordLayout
    form: str = "kernel"
    tile: int = 0

    def record_layout(self) -> RecordLayout:
        """The layout of a packed record: where a matrix stood, its codes and then its scales."""
        fields: list[tuple[str, tuple[int, ...], str]] = []
        for field in self.expanded.fields:
            if not is_matrix(field):
                fields.append((field.name, field.shape, field.dtype))
                continue
            if self.form == "kernel":
                codes, scales = rounding.shapes(self.format, *self.out_in(field), self.tile)
            else:
                codes, scales = grouped.shapes(self.format, field.shape, 0 if self.transposed else 1)
            fields.append((field.name, codes, "int8" if self.format == "int8" else "uint8"))
            fields.append((field.name + SCALE, scales, "bfloat16"))
        return RecordLayout.build(fields)

    def out_in(self, field: Field) -> tuple[int, int]:
        """Outputs and inputs of a matrix."""
        first, second = field.shape
        return (second, first) if self.transposed else (first, second)

    @torch.no_grad()
    def pack(self, weights: Tensors, packed: Tensors) -> None:
        """Rounds the tensors of one expert into the views of a packed record.

        Raises:
            MelinoeError: a weight is not finite, or so large that its dtype could not hold the rounded one.
        """
        assert self.form == "kernel", self.form
        write, _ = rounding.of(self.format)
        for field in self.expanded.fields:
            weight = weights[field.name]
            if not is_matrix(field):
                packed[field.name].copy_(weight)
                continue
            _check_range(weight, f"{field.name} as {self.format}")
            weight_OI = weight.T if self.transposed else weight
            write(weight_OI, packed[field.name], packed[field.name + SCALE])

    @torch.no_grad()
    def expand(self, packed: Tensors, weights: Tensors) -> None:
        """The inverse of `pack`: writes what a packed record stands for into the tensors of one expert."""
        for field in self.expanded.fields:
            self.expand_one(field, packed, weights[field.name])

    def expand_one(
        self, field: Field, packed: Tensors, weight: torch.Tensor, tile: int | None = None
    ) -> None:
        """Writes one tensor of an expert.

        Args:
            tile: of the codes in memory, where it is not the store's (`rounding.retile`).
        """
        codes = packed[field.name]
        if not is_matrix(field):
            weight.copy_(codes)
            return
        scale = packed[field.name + SCALE]
        if self.form == "grouped":
            grouped.expand(self.format, codes, scale, weight, 0 if self.transposed else 1)
            return
        weight_OI = weight.T if self.transposed else weight
        if self.format == "int4":
            codes = codes.view(-1, codes.shape[1], (tile or self.tile) // 2)
        _, expand = rounding.of(self.format)
        expand(codes, scale, weight_OI)

    def to_json(self) -> dict[str, Any]:
        group = (
            {"int8": None, "int4": rounding.GROUP}[self.format] if self.form == "kernel" else grouped.GROUP
        )
        form = {"form": self.form, "tile": self.tile} if self.form == "kernel" else {}
        return {
            "format": self.format,
            **form,
            "group": group,
            "transposed": self.transposed,
            "expanded": self.expanded.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Packing:
        """Raises MelinoeError for a format that this version does not know."""
        found = cls(
            data["format"],
            data["transposed"],
            RecordLayout.from_json(data["expanded"]),
            data.get("form", "grouped"),
            data.get("tile", 0),
        )
        tiles = rounding.TILES if (found.form, found.format) == ("kernel", "int4") else (0,)
        known = found.format in FORMATS[1:] and found.form in FORMS and found.tile in tiles
        if not known or found.to_json()["group"] != data["group"]:
            raise MelinoeError(
                "unknown format of records",
                got=f"{found.format} in groups of {data['group']}, form {found.form}, tiles of {found.tile}",
                allowed=f"{', '.join(FORMATS)}; groups and tiles as docs/store.md has them",
                next_step="convert again with this version of melinoe",
            )
        return found


def check_format(name: str) -> None:
    """Raises MelinoeError where there is no such store format."""
    if name not in FORMATS:
        raise MelinoeError("unknown store format", got=name, allowed=", ".join(FORMATS))


def packing_of(
    name: str, layout: RecordLayout, transposed: bool, like: Packing | None = None
) -> Packing | None:
    """How records of a layout are packed in a store format; None for `auto`, which packs nothing.

    Args:
        like: has the form and the tile; None: what is written today, on this machine.
    """
    if name == "auto":
        return None
    if like is not None:
        return Packing(name, transposed, layout, like.form, like.tile)
    tile = machine_tile() or rounding.TILES[0]
    return Packing(name, transposed, layout, "kernel", tile if name == "int4" else 0)


def is_matrix(field: Field) -> bool:
    """Whether a tensor of an expert is rounded; vectors stay."""
    return len(field.shape) == 2 and torch_dtype(field.dtype).is_floating_point


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
