"""`melinoe convert`: checkpoint -> store, one expert in memory at a time.

The store is built in TARGET.partial and renamed when it is complete, so that no half store ever loads.
Record files are finished one by one; an interrupted call keeps them, and the next call with the same
source goes on behind them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file

from melinoe.config import format_bytes, resolve_model
from melinoe.errors import MelinoeError
from melinoe.moe import experts_modules, moe_layers
from melinoe.offload import checkpoint
from melinoe.offload.formats import Packing, check_format, packing_of
from melinoe.offload.layout import RecordLayout
from melinoe.offload.store import (
    Store,
    StoredLayer,
    is_store,
    layer_from_json,
    layer_to_json,
    open_store,
    write_layer,
    write_manifest,
)

STATE = "convert-state.json"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def convert(source: str | Path, target: str | Path, *, format: str = "auto", progress: bool = True) -> Store:
    """Writes a store of a mixture-of-experts checkpoint.

    Args:
        source: model folder, or `tiny`.
        target: folder to make. It must not exist, or be a store of the same source.
        format: of the records: auto (the checkpoint's own dtype), int8 or int4 (melinoe.offload.formats).
        progress: show a progress bar on stderr.

    Returns:
        The opened store.

    Raises:
        MelinoeError: no such model or format, a dense model, a target in the way, weights that cannot be
            rounded, or a full disk.
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
    model = checkpoint.skeleton(folder)
    moe_layers(model)  # a dense model is refused before anything is written
    shards = checkpoint.Shards(folder)
    with _partial_folder(target) as partial:
        state = _State.open(partial, folder, shards, format)
        layers = _write_experts(model, shards, partial, state, format, progress)
        _write_rest(model, shards, folder, partial)
        _finish(partial, target, layers, state.store_id, str(source))
    return open_store(target)


def local_folder(source: Path | str) -> Path:
    """The folder of a model: itself, or what huggingface_hub has fetched for an id."""
    if isinstance(source, Path):
        return source
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
            )
        )
    except Exception as error:
        raise MelinoeError(
            "no such model folder, and the Hub has no such model or cannot be reached",
            got=source,
            next_step=f"check the name ({type(error).__name__})",
        ) from error


@contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """The folder a store is built in, held by one process at a time."""
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
    except BlockingIOError:
        raise MelinoeError(f"another process is converting into {target}", next_step="wait for it") from None
    finally:
        os.close(descriptor)


class _State:
    """What an interrupted call has finished: {layer index: stored layer}, for one source and format."""

    def __init__(
        self, path: Path, source: dict[str, Any], store_id: str, layers: dict[int, StoredLayer]
    ) -> None:
        self.path, self.source, self.store_id, self.layers = path, source, store_id, layers

    @classmethod
    def open(cls, partial: Path, folder: Path, shards: checkpoint.Shards, format: str) -> _State:
        sizes = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in shards.files}
        source = {"folder": str(folder.resolve()), "files": sizes, "format": format}
        path = partial / STATE
        try:
            data = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            data = {}
        if data.get("source") == source:
            layers = {int(index): layer_from_json(layer) for index, layer in data["layers"].items()}
            return cls(path, source, data["store_id"], layers)
        for leftover in partial.iterdir():  # of another source, or from before the first layer was whole
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return cls(path, source, uuid.uuid4().hex, {})

    def finished(self, index: int, layer: StoredLayer) -> None:
        self.layers[index] = layer
        layers = {str(key): layer_to_json(value) for key, value in self.layers.items()}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"source": self.source, "store_id": self.store_id, "layers": layers}))
        temporary.replace(self.path)


def _write_experts(
    model: torch.nn.Module,
    shards: checkpoint.Shards,
    partial: Path,
    state: _State,
    format: str,
    progress: bool,
) -> list[StoredLayer]:
    expert_plan, _ = checkpoint.plan(model, shards.names())
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
            records = _records(model, shards, expert_plan, name, module, expanded[index])
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
    for _ in range(num_experts):
        for field, stream in streams.items():
            views[field].copy_(next(stream))
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


def _write_rest(model: torch.nn.Module, shards: checkpoint.Shards, folder: Path, partial: Path) -> None:
    """Everything but the experts, under its own name; tokenizer and templates; the config with our mark."""
    _, rest = checkpoint.plan(model, shards.names())
    save_file(
        {name: shards.tensor(name).contiguous() for name in rest},
        partial / "model.safetensors",
        {"format": "pt"},
    )
    for file in folder.iterdir():
        if file.is_file() and not file.name.endswith(_NOT_COPIED) and file.name != "config.json":
            shutil.copyfile(file, partial / file.name)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "melinoe"}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _finish(partial: Path, target: Path, layers: list[StoredLayer], store_id: str, source: str) -> None:
    """Writes the manifest, computes the fingerprint from the written weights, and renames."""
    from melinoe.offload.loader import store_fingerprint

    store = Store(partial, "", store_id, tuple(layers), source)
    write_manifest(store, {})
    store = Store(partial, store_fingerprint(partial), store_id, tuple(layers), source)
    write_manifest(store, {"transformers_version": transformers.__version__})
    (partial / STATE).unlink(missing_ok=True)
    if target.exists():
        target.rmdir()  # an empty folder that was there before
    partial.rename(target)
