"""`melinoe convert --adapter`: a tuning goes into the records while they are written.

The same sum in the same order as `melinoe merge`, one expert at a time, so that the store is bit for bit
the one that merging first would give, without a merged checkpoint on disk or in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from melinoe.adapters.peft_folder import WEIGHTS, Adapter, adapter_parts, check_base, read_adapter
from melinoe.conversion.checkpoint import Checkpoint
from melinoe.errors import MelinoeError
from melinoe.experts.low_rank import LowRankExperts, Projection, fold_expert, projection_parameter
from melinoe.models.layers import MoeLayer
from melinoe.sticky.settings import CONFIG_FIELD


@dataclass(frozen=True)
class Tuning:
    """What an adapter changes: factors by the experts' name, routers by their names in the checkpoint."""

    adapter: Adapter
    factors: dict[str, LowRankExperts]
    routers: dict[str, torch.Tensor]
    stamp: list[int | str]  # which adapter: path, size, time in nanoseconds
    config: dict[str, Any]  # fields of the config that it changes; None: takes away

    def merge(self, layer: MoeLayer, field: str, expert: int, weight: torch.Tensor) -> None:
        """Puts the tuning into one tensor of an expert, in place."""
        projections: tuple[Projection, ...] = ("up", "down")
        factors, transposed = self.factors[layer.experts_name], bool(layer.experts.is_transposed)
        for projection in projections:
            if field == projection_parameter(layer.experts, projection):
                fold_expert(weight, factors, projection, expert, transposed)


@torch.no_grad()
def open_tuning(folder: str | Path, checkpoint: Checkpoint) -> Tuning:
    """Opens an adapter for a checkpoint, whose model's routers get their weights.

    Raises:
        MelinoeError: the adapter is of another model or broken, or the checkpoint does not hold its routers
            as they are.
    """
    adapter = read_adapter(folder)
    absent = checkpoint.load_routers()
    if absent:
        raise MelinoeError(
            "the checkpoint does not hold the routers under names that can be replaced",
            got=f"nothing for {absent}",
            next_step="merge the adapter first: melinoe merge, then convert the result",
        )
    stored = {target: name for name, target in checkpoint.resident().items() if target}
    routers, factors = {}, {}
    parts = adapter_parts(checkpoint.model, adapter)
    check_base(adapter, checkpoint.identity())  # experts when they pass
    for layer, (low_rank, router) in zip(checkpoint.layers, parts, strict=True):
        factors[layer.experts_name] = low_rank
        for name in layer.router.state_dict():
            # as it was tuned, in float32: what from_pretrained rounds, and what it keeps, is its own business
            routers[stored[f"{layer.router_name}.{name}"]] = router[name]
    status = (adapter.folder / WEIGHTS).stat()
    stamp: list[int | str] = [str(adapter.folder.resolve()), status.st_size, status.st_mtime_ns]
    # an adapter from before there was stickiness says nothing of it
    config = {CONFIG_FIELD: adapter.card["sticky"]} if "sticky" in adapter.card else {}
    return Tuning(adapter, factors, routers, stamp, config)
