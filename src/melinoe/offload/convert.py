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

from melinoe.config import format_bytes, resolve_model
from melinoe.errors import MelinoeError
from melinoe.moe import experts_modules, fingerprint, moe_layers
from melinoe.offload import checkpoint
from melinoe.offload.formats import Packing, check_format, packing_of
from melinoe.offload.layout import RecordLayout
from melinoe.offload.merging import Tuning, open_tuning
from melinoe.offload.rest import write_rest
from melinoe.offload.shards import Stamp
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
        format: of the records: auto (the checkpoint's own dtype), int8 or int4 (melinoe.offload.formats).
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
    model = checkpoint.skeleton(folder)
    moe_layers(model)  # a dense model is refused before anything is written
    shards, quantizer = checkpoint.Shards(folder), checkpoint.dequantizer(model.config)
    expert_plan, rest = checkpoint.plan(model, shards.names(), quantizer)
    tuning = open_tuning(adapter, model, shards, rest) if adapter is not None else None
    with partial_folder(target) as partial:
        state = _State.open(partial, folder, shards, tuning, format)
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


def local_folder(source: Path | str, weights: bool = True) -> Path:
    """The folder of a model: itself, or what huggingface_hub has fetched for an id.

    Args:
        weights: fetch weights too; if not, they may be there from an earlier call.
    """
    if isinstance(source, Path):
        return source
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:
        raise MelinoeError(
            "no such model folder, and the Hub has no such model or cannot be reached",
            got=source,
            next_step=f"check the name ({type(error).__name__})",
        ) from error


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
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


def empty(folder: Path) -> None:
    """Removes what stands in a folder; of links the links alone."""
    for leftover in folder.iterdir():
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


class _State:
    """What an interrupted call has finished: {layer index: stored layer}, for one source and format."""

    def __init__(
        self, path: Path, source: dict[str, Any], store_id: str, layers: dict[int, StoredLayer]
    ) -> None:
        self.path, self.source, self.store_id, self.layers = path, source, store_id, layers

    @classmethod
    def open(
        cls, partial: Path, folder: Path, shards: checkpoint.Shards, tuning: Tuning | None, format: str
    ) -> _State:
        sizes = {stamp.file: [stamp.size, stamp.mtime_ns] for stamp in shards.stamps}
        source: dict[str, Any] = {"folder": str(folder.resolve()), "files": sizes, "format": format}
        if tuning is not None:
            source["adapter"] = tuning.stamp
        path = partial / STATE
        try:
            data = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            data = {}
        if data.get("source") == source:
            layers = {int(index): layer_from_json(layer) for index, layer in data["layers"].items()}
            return cls(path, source, data["store_id"], layers)
        empty(partial)  # of another source, or from before the first layer was whole
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
    expert_plan: dict[str, checkpoint.Sources],
    partial: Path,
    state: _State,
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


def copy_small_files(folder: Path, partial: Path) -> None:
    """Tokenizer, templates and generation config; the config with our mark."""
    for file in folder.iterdir():
        if file.is_file() and not file.name.endswith(_NOT_COPIED) and file.name != "config.json":
            shutil.copyfile(file, partial / file.name)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "melinoe"}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def finish(
    partial: Path,
    target: Path,
    layers: list[StoredLayer],
    store_id: str,
    source: str,
    known: str,
    shards: tuple[Stamp, ...] = (),
) -> None:
    """Writes the manifest and renames.

    Args:
        known: the fingerprint; "" where the routers are not stored as they are: then it is computed by
            loading what was written.
    """
    from melinoe.offload.loader import store_fingerprint

    if not known:
        write_manifest(Store(partial, "", store_id, tuple(layers), source, shards), {})
        known = store_fingerprint(partial)
    store = Store(partial, known, store_id, tuple(layers), source, shards)
    write_manifest(store, {"transformers_version": transformers.__version__})
    (partial / STATE).unlink(missing_ok=True)
    if target.exists():
        target.rmdir()  # an empty folder that was there before
    partial.rename(target)
