"""The experts of a model as records: how large, in every store format, before they are taken out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from melinoe.experts.low_rank import projection_size
from melinoe.models.layers import MoeLayer
from melinoe.models.undecorated import has_flat_experts
from melinoe.store.layout import RecordLayout
from melinoe.store.packing import packing_of


@dataclass(frozen=True)
class Records:
    """The experts of a model, before they are taken out of it.

    layouts: of each layer, in its own dtype. module: of the first layer. hidden_size: of its inputs.
    """

    layouts: tuple[RecordLayout, ...]
    num_experts: tuple[int, ...]
    module: Any
    hidden_size: int

    @classmethod
    def of(cls, model: Any, layers: list[MoeLayer]) -> Records:
        first = layers[0].experts
        hidden_size = model.config.get_text_config().hidden_size
        if not has_flat_experts(model):
            hidden_size, _ = projection_size(first, "up")
        return cls(
            tuple(RecordLayout.of(layer.experts) for layer in layers),
            tuple(layer.num_experts for layer in layers),
            first,
            int(hidden_size),
        )

    def in_format(self, format: str) -> list[tuple[int, int]]:
        """(experts, bytes of a record) of each layer in a store format."""
        sizes = []
        for layout in self.layouts:
            packing = packing_of(format, layout, bool(self.module.is_transposed))
            sizes.append((layout if packing is None else packing.record_layout()).record_bytes)
        return list(zip(self.num_experts, sizes, strict=True))
