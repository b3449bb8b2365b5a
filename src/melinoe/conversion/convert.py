"""`melinoe convert`: checkpoint -> store, one expert in memory at a time.

Record files are finished one by one; an interrupted call keeps them, and the next call with the same
source goes on behind them (build.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from melinoe.adapters.peft_folder import OtherBaseError, check_base
from melinoe.config import format_bytes
from melinoe.conversion.build import STORE, BuildState, copy_small_files, finish
from melinoe.conversion.checkpoint import Checkpoint
from melinoe.conversion.fold_adapter import Tuning, open_tuning
from melinoe.conversion.resident import write_resident
from melinoe.errors import MelinoeError
from melinoe.files import empty, partial_folder
from melinoe.models.folder import local_folder, resolve_model
from melinoe.models.identity import beginning, digest, sampled_experts
from melinoe.models.layers import MoeLayer
from melinoe.outputs import Output
from melinoe.store.layout import RecordLayout
from melinoe.store.manifest import RESIDENT, Store, is_store, open_store
from melinoe.store.packing import Packing, check_format, packing_of
from melinoe.store.record_file import StoredLayer, write_layer
from melinoe.store.shards import Shards


def convert(
    source: str | Path | Checkpoint,
    target: str | Path,
    *,
    adapter: str | Path | None = None,
    format: str = "auto",
    progress: bool = True,
) -> Store:
    """Writes a store of a mixture-of-experts checkpoint.

    Args:
        source: model folder, Hub id, or `tiny`. fp8 and mxfp4 checkpoints are dequantised on the way.
        target: folder to make. It must not exist, or be a store of the same source.
        adapter: what `melinoe tune` wrote; merged into the records, as `melinoe merge` would.
        format: of the records: auto (the checkpoint's own dtype), int8 or int4 (melinoe.store.packing).
        progress: show a progress bar on stderr.

    Returns:
        The opened store.

    Raises:
        MelinoeError: no such model or format, a dense model, a target in the way, an adapter of another
            model, a quantised format that cannot be streamed, weights that cannot be rounded, or a full disk.
    """
    check_format(format)
    target = Path(target)
    folder = source.folder if isinstance(source, Checkpoint) else local_folder(resolve_model(source))
    if is_store(folder):
        raise MelinoeError(f"{folder} is a store already", allowed="a checkpoint folder")
    Output(target, STORE, {"model": folder, "adapter": adapter}).check()
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(folder, source)
    checkpoint.resident()  # what cannot be converted is refused before anything is written
    tuning = open_tuning(adapter, checkpoint) if adapter is not None else None
    with partial_folder(target) as partial:
        state = BuildState(partial, checkpoint, tuning, format)
        try:
            _write_experts(checkpoint, state, tuning, progress)
        except OtherBaseError:  # with no adapter like this one would the call go on
            empty(partial)
            raise
        routers = tuning.routers if tuning is not None else None
        write_resident(checkpoint, partial / RESIDENT, routers)
        copy_small_files(checkpoint, partial, RESIDENT, tuning.config if tuning is not None else None)
        known = checkpoint.fingerprint(Shards([partial / RESIDENT]))
        layers = tuple(state.layers[index] for index in range(len(checkpoint.layers)))
        finish(Store(partial, known, state.store_id, layers, checkpoint.source), target)
    return open_store(target)


@dataclass(frozen=True)
class _Records:
    """The records of one layer.

    expanded: the layout of the module's own parameters. packing: how they are stored.
    """

    layer: MoeLayer
    expanded: RecordLayout
    packing: Packing | None

    @classmethod
    def of(cls, layer: MoeLayer, format: str) -> _Records:
        expanded = RecordLayout.of(layer.experts)
        return cls(layer, expanded, packing_of(format, expanded, bool(layer.experts.is_transposed)))

    @property
    def layout(self) -> RecordLayout:
        return self.expanded if self.packing is None else self.packing.record_layout()

    def unwritten(self) -> StoredLayer:
        layer = self.layer
        return StoredLayer.unwritten(layer.experts_name, layer.num_experts, self.layout, self.packing)

    def read(
        self, checkpoint: Checkpoint, tuning: Tuning | None, seen: list[torch.Tensor]
    ) -> Iterator[memoryview]:
        """Expert by expert in full size; one buffer, filled again for each.

        Args:
            seen: is given the beginnings of the tensors by which the experts are known.

        Raises:
            OtherBaseError: these experts, all read by then, are not those that were tuned.
        """
        looked_at = sampled_experts(self.layer.index, self.layer.num_experts)
        base: list[torch.Tensor] = []
        record = torch.zeros(self.expanded.record_bytes, dtype=torch.uint8)
        views = self.expanded.views(record)
        streams = {name: one.tensors() for name, one in checkpoint.parameters(self.layer).items()}
        for expert in range(self.layer.num_experts):
            for field, stream in streams.items():
                tensor = next(stream)
                if tuning is not None:
                    if expert in looked_at:
                        base.append(beginning(tensor).clone())
                    tuning.merge(self.layer, field, expert, tensor)
                views[field].copy_(tensor)
                del tensor  # the next one is made before this name is given again
            if expert in looked_at:
                seen += [beginning(view).clone() for view in views.values()]
            yield memoryview(record.numpy())
        if tuning is not None:
            check_base(tuning.adapter, {self.layer.experts_name: digest(base)})

    def packed(self, records: Iterator[memoryview]) -> Iterator[memoryview]:
        """The records as they are stored; all in one buffer, as those behind `records` are."""
        if self.packing is None:
            yield from records
            return
        layout = self.packing.record_layout()
        packed = torch.zeros(layout.record_bytes, dtype=torch.uint8)
        views = layout.views(packed)
        for record in records:
            self.packing.pack(self.expanded.views(torch.frombuffer(record, dtype=torch.uint8)), views)
            yield memoryview(packed.numpy())


def _write_experts(checkpoint: Checkpoint, state: BuildState, tuning: Tuning | None, progress: bool) -> None:
    """Writes the record files that `state` does not have yet, and tells it."""
    todo = [
        _Records.of(layer, state.format) for layer in checkpoint.layers if layer.index not in state.layers
    ]
    needed = sum(records.layout.record_bytes * records.layer.num_experts for records in todo)
    free = shutil.disk_usage(state.folder).free
    if needed * 1.02 > free:
        raise MelinoeError(
            f"not enough disk space at {state.folder.parent}",
            got=f"{format_bytes(free)} free",
            allowed=f"{format_bytes(needed * 1.02)} or more",
        )
    total = sum(layer.num_experts for layer in checkpoint.layers)
    done = sum(layer.num_experts for layer in state.layers.values())
    with _progress_bar(progress) as bar:
        task = bar.add_task("convert", total=total, completed=done)
        for records in todo:
            index, seen = records.layer.index, []  # type: ignore[var-annotated]
            packed = _counted(records.packed(records.read(checkpoint, tuning, seen)), bar, task)
            written = write_layer(state.folder, index, state.store_id, records.unwritten(), packed)
            state.finished(index, replace(written, identity=digest(seen) if records.packing else ""))


def _progress_bar(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show, transient=True)


def _counted(records: Iterator[memoryview], bar: Progress, task: Any) -> Iterator[memoryview]:
    for record in records:
        yield record
        bar.advance(task)
