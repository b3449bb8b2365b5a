"""A store while it is being built: in TARGET.partial, renamed when complete (melinoe.files).

No half store ever loads.

What an interrupted call has finished is kept in convert-state.json, and counts for the same source only.
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from melinoe.conversion.fold_adapter import Tuning
from melinoe.files import empty, put_folder, write_json
from melinoe.models.layers import fingerprint
from melinoe.store.manifest import Store, write_manifest
from melinoe.store.record_file import StoredLayer, layer_from_json, layer_to_json
from melinoe.store.shards import Shards, Stamp

STATE = "convert-state.json"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


class BuildState:
    """What an interrupted call has finished: {layer index: stored layer}, for one source and format."""

    def __init__(
        self, path: Path, source: dict[str, Any], store_id: str, layers: dict[int, StoredLayer]
    ) -> None:
        self.path, self.source, self.store_id, self.layers = path, source, store_id, layers

    @classmethod
    def open(
        cls, partial: Path, folder: Path, shards: Shards, tuning: Tuning | None, format: str
    ) -> BuildState:
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
        write_json(self.path, {"source": self.source, "store_id": self.store_id, "layers": layers})


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
    """Writes the manifest and puts the store in its place.

    Args:
        known: the fingerprint; "" where the routers are not stored as they are: then it is computed by
            loading what was written.
    """
    if not known:
        write_manifest(Store(partial, "", store_id, tuple(layers), source, shards), {})
        known = _fingerprint(partial)
    store = Store(partial, known, store_id, tuple(layers), source, shards)
    write_manifest(store, {"transformers_version": transformers.__version__})
    (partial / STATE).unlink(missing_ok=True)
    put_folder(partial, target, replace=bool(shards))  # an index is made again whenever a shard has changed


def _fingerprint(folder: Path) -> str:
    """The routing fingerprint of a store that has none yet.

    transformers opens the store by our plug-in (runtime.quantizer).
    """
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {**config.quantization_config, "slots": 0}
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=config.dtype)
    model.melinoe_context.pager.close()
    return fingerprint(model)
