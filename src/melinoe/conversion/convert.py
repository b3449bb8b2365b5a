"""`melinoe convert`: checkpoint -> store, one expert in memory at a time.

Record files are finished one by one; an interrupted call keeps them, and the next call with the same
source goes on behind them (building.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from melinoe.config import format_bytes
from melinoe.conversion import checkpoint
from melinoe.conversion.build import BuildState, copy_small_files, finish
from melinoe.conversion.fold_adapter import Tuning, open_tuning
from melinoe.conversion.resident import write_rest
from melinoe.errors import MelinoeError
from melinoe.files import partial_folder
from melinoe.models.folder import local_folder, resolve_model, skeleton
from melinoe.models.layers import experts_modules, fingerprint, moe_layers
from melinoe.store.layout import RecordLayout
from melinoe.store.manifest import Store, is_store, open_store
from melinoe.store.packing import Packing, check_format, packing_of
from melinoe.store.record_file import StoredLayer, write_layer


def convert(
    source: str | Path,
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
    resolved = resolve_model(source)
    folder, target = local_folder(resolved), Path(target)
    if is_store(folder):
        raise MelinoeError(f"{folder} is a store already", allowed="a checkpoint folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise MelinoeError(
            f"{target} exists", allowed="a new folder", next_step="remove it or choose another name"
        )
    if folder.resolve() == target.resolve():
        raise MelinoeError("source and target are the same folder", got=target)
    model = skeleton(folder)
    moe_layers(model)  # a dense model is refused before anything is written
    shards, quantizer = checkpoint.Shards(folder), checkpoint.dequantizer(model.config)
    expert_plan, rest = checkpoint.plan(model, shards.names(), quantizer)
    tuning = open_tuning(adapter, model, shards, rest) if adapter is not None else None
    with partial_folder(target) as partial:
        state = BuildState.open(partial, folder, shards, tuning, format)
        layers = _write_experts(model, shards, expert_plan, partial, state, tuning, format, progress)
        write_rest(
            shards,
            rest,
            partial / "model.safetensors",
            quantizer=quantizer,
            dtype=model.config.dtype or torch.bfloat16,
            replaced=tuning.routers if tuning is not None else None,
        )
        copy_small_files(folder, partial)
        written = checkpoint.Shards(partial)
        known = fingerprint(model) if not checkpoint.load_routers(model, written, rest) else ""
        finish(partial, target, layers, state.store_id, str(source), known)
    return open_store(target)


def _write_experts(
    model: torch.nn.Module,
    shards: checkpoint.Shards,
    expert_plan: dict[str, checkpoint.Sources],
    partial: Path,
    state: BuildState,
    tuning: Tuning | None,
    format: str,
    progress: bool,
) -> list[StoredLayer]:
    modules = experts_modules(model)
    expanded = [RecordLayout.of(module) for _, module in modules]
    packings = [
        packing_of(format, layout, bool(module.is_transposed))
        for layout, (_, module) in zip(expanded, modules, strict=True)
    ]
    layouts = [
        layout if packing is None else packing.record_layout()
        for layout, packing in zip(expanded, packings, strict=True)
    ]
    todo = [index for index in range(len(modules)) if index not in state.layers]
    needed = sum(layouts[i].record_bytes * int(modules[i][1].num_experts) for i in todo)  # type: ignore[arg-type]
    free = shutil.disk_usage(partial).free
    if needed * 1.02 > free:
        raise MelinoeError(
            f"not enough disk space at {partial.parent}",
            got=f"{format_bytes(free)} free",
            allowed=f"{format_bytes(needed * 1.02)} or more",
        )
    total = sum(int(module.num_experts) for _, module in modules)  # type: ignore[arg-type]
    done = sum(layer.num_experts for layer in state.layers.values())
    with _progress_bar(progress) as bar:
        task = bar.add_task("convert", total=total, completed=done)
        for index in todo:
            name, module = modules[index]
            num_experts = int(module.num_experts)  # type: ignore[arg-type]
            records = _records(model, shards, expert_plan, name, module, expanded[index], tuning)
            packed = _packed(records, expanded[index], packings[index])
            layer = write_layer(
                partial, index, state.store_id, name, num_experts, layouts[index],
                _counted(packed, bar, task), packings[index],
            )  # fmt: skip
            state.finished(index, layer)
    return [state.layers[index] for index in range(len(modules))]


def _progress_bar(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show, transient=True)


def _counted(records: Iterator[memoryview], bar: Progress, task: Any) -> Iterator[memoryview]:
    for record in records:
        yield record
        bar.advance(task)


def _records(
    model: torch.nn.Module,
    shards: checkpoint.Shards,
    expert_plan: dict[str, checkpoint.Sources],
    name: str,
    module: torch.nn.Module,
    layout: RecordLayout,
    tuning: Tuning | None,
) -> Iterator[memoryview]:
    """The records of one layer; one buffer, filled again for each expert."""
    record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
    views = layout.views(record)
    num_experts = int(module.num_experts)  # type: ignore[arg-type]
    streams = {
        field.name: checkpoint.expert_tensors(
            model, shards, f"{name}.{field.name}", expert_plan[f"{name}.{field.name}"], num_experts
        )
        for field in layout.fields
    }
    for expert in range(num_experts):
        for field, stream in streams.items():
            tensor = next(stream)
            if tuning is not None:
                tuning.merge(name, module, field, expert, tensor)
            views[field].copy_(tensor)
            del tensor  # the next one is made before this name is given again
        yield memoryview(record.numpy())


def _packed(
    records: Iterator[memoryview], layout: RecordLayout, packing: Packing | None
) -> Iterator[memoryview]:
    """The records as they are stored; one buffer, as there is one behind `records`."""
    if packing is None:
        yield from records
        return
    packed_layout = packing.record_layout()
    packed = torch.zeros(packed_layout.record_bytes, dtype=torch.uint8)
    views = packed_layout.views(packed)
    for record in records:
        packing.pack(layout.views(torch.frombuffer(record, dtype=torch.uint8)), views)
        yield memoryview(packed.numpy())
