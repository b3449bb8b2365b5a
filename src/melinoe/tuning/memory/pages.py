"""Whether and how the experts of a tuning run are paged: from `--memory`, or because the model is a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from melinoe.conversion.first_use import store_of
from melinoe.errors import MelinoeError
from melinoe.machine import return_freed_memory
from melinoe.models.folder import resolve_model
from melinoe.runtime.division import given_bytes, refuse_more_than_there_is
from melinoe.runtime.load import stats
from melinoe.store.manifest import is_store
from melinoe.tuning.memory.activations import BatchShape
from melinoe.tuning.memory.needed import TuningMemory, memory_needed
from melinoe.tuning.memory.parts import Division, divide
from melinoe.tuning.settings import TuneSettings


@dataclass(frozen=True)
class Pages:
    """How experts are paged while tuning; `source` is the checkpoint behind the store, where it is known.

    parts: batches of a step that a process computes one after the other.
    """

    folder: Path
    slots: int
    slots_format: str | None
    record_format: str
    source: str
    parts: int = 1

    def to_json(self, model: Any) -> dict[str, Any]:
        """What a run says of its paging; `model` is the one that was tuned."""
        counted = stats(model)
        return {
            "slots": self.slots,
            "slots_format": self.slots_format,
            "parts": self.parts,
            "loads": counted.training_loads,
            "hits": counted.training_hits,
            "bytes_read": counted.training_bytes,
        }


def paging(
    model: str | Path,
    memory: int | str | None,
    settings: TuneSettings,
    batch_of: Callable[[int], BatchShape],
    device: str,
) -> Pages | None:
    """None: everything resident. A store without a budget gets a slot for every expert.

    Args:
        batch_of: the largest batch of a run whose steps one process computes in so many parts.

    Raises:
        MelinoeError: the budget is too small, or there is none and the machine is too small; or the weights
            are to be divided among processes as well.
    """
    resolved = resolve_model(model)
    given_store = isinstance(resolved, Path) and is_store(resolved)
    whole = settings.accumulate
    if memory is None and not settings.shard:  # before an index or a store is made
        needed = memory_needed(model, settings, batch_of(whole), device)
        needed.refuse_more_than_there_is(all_slots=given_store)
    if memory is None and not given_store:
        return None
    if settings.shard:
        raise MelinoeError(
            "tune: weights cannot be both divided among processes and paged",
            got="--shard with --memory or a store",
        )
    if memory is not None:
        refuse_more_than_there_is(memory, torch.device(device))
        return_freed_memory()
        # refused before an index or a store is made
        memory_needed(model, settings, batch_of(whole), device).slots(memory)
    store = store_of(model)
    source = store.source if given_store and store.source else str(model)
    if memory is None:
        most = max(layer.num_experts for layer in store.layers)
        return Pages(store.folder, most, None, store.record_format, source, whole)
    found = divided(store.folder, memory, settings, batch_of, device)
    return Pages(store.folder, found.slots, found.slots_format, store.record_format, source, found.parts)


def divided(
    model: str | Path,
    memory: int | str,
    settings: TuneSettings,
    batch_of: Callable[[int], BatchShape],
    device: str,
) -> Division:
    """What a budget makes of the steps of a run.

    Raises:
        MelinoeError: it is too small, or there is no such model.
    """

    def needed_of(parts: int) -> TuningMemory:
        return memory_needed(model, replace(settings, accumulate=parts), batch_of(parts), device)

    return divide(needed_of, settings.accumulate, given_bytes(memory, torch.device(device)))
