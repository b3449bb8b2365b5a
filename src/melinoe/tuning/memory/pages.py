"""Whether and how the experts of a tuning run are paged: from `--memory`, or because the model is a store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from melinoe.conversion.first_use import store_of
from melinoe.errors import MelinoeError
from melinoe.machine import return_freed_memory
from melinoe.models.folder import resolve_model
from melinoe.runtime.budget import refuse_more_than_there_is
from melinoe.runtime.load import stats
from melinoe.store.manifest import is_store
from melinoe.tuning.memory.activations import BatchShape
from melinoe.tuning.memory.needed import memory_needed
from melinoe.tuning.settings import TuneSettings


@dataclass(frozen=True)
class Pages:
    """How experts are paged while tuning; `source` is the checkpoint behind the store, where it is known."""

    folder: Path
    slots: int
    slots_format: str | None
    record_format: str
    source: str

    def to_json(self, model: Any) -> dict[str, Any]:
        """What a run says of its paging; `model` is the one that was tuned."""
        counted = stats(model)
        return {
            "slots": self.slots,
            "slots_format": self.slots_format,
            "loads": counted.training_loads,
            "hits": counted.training_hits,
            "bytes_read": counted.training_bytes,
        }


def paging(
    model: str | Path, memory: int | str | None, settings: TuneSettings, batch: BatchShape, device: str
) -> Pages | None:
    """None: everything resident. A store without a budget gets a slot for every expert.

    Raises:
        MelinoeError: the budget is too small, or there is none and the machine is too small; or the weights
            are to be divided among processes as well.
    """
    resolved = resolve_model(model)
    given_store = isinstance(resolved, Path) and is_store(resolved)
    if memory is None and not settings.shard:  # before an index or a store is made
        memory_needed(model, settings, batch, device).refuse_more_than_there_is(all_slots=given_store)
    if memory is None and not given_store:
        return None
    if settings.shard:
        raise MelinoeError(
            "tune: weights are divided among processes, or paged by each",
            got="--shard with --memory or a store",
        )
    if memory is not None:
        refuse_more_than_there_is(memory, torch.device(device))
        return_freed_memory()
        # refused before an index or a store is made
        memory_needed(model, settings, batch, device).slots(memory)
    store = store_of(model)
    slots, kind = max(layer.num_experts for layer in store.layers), None
    if memory is not None:
        slots, kind = memory_needed(store.folder, settings, batch, device).slots(memory)
    source = store.source if given_store and store.source else str(model)
    return Pages(store.folder, slots, kind, store.record_format, source)
