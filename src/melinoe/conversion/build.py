"""A store while it is being built: in TARGET.melinoe-partial, renamed when complete (melinoe.files).

No half store ever loads.

What an interrupted call has finished is kept in convert-state.json, and counts for the same source only.
"""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from melinoe.conversion.checkpoint import Checkpoint
from melinoe.conversion.fold_adapter import Tuning
from melinoe.files import empty, put_folder, write_json
from melinoe.models.layers import fingerprint
from melinoe.outputs import Kind
from melinoe.store.manifest import Store, write_manifest
from melinoe.store.record_file import StoredLayer, layer_from_json, layer_to_json

STATE = "convert-state.json"
STORE = Kind("a store", True, lambda folder: "")  # none is ever replaced, so none is ever recognised
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


class BuildState:
    """What an interrupted call has finished, in one folder, for one source and format.

    Attributes:
        folder: where the store is built.
        format: of the records.
        layers: {layer index: stored layer} of the record files that are whole.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, tuning: Tuning | None, format: str) -> None:
        self.folder, self.format = folder, format
        sizes = {stamp.file: [stamp.size, stamp.mtime_ns] for stamp in checkpoint.shards.stamps}
        self._source: dict[str, Any] = {"folder": str(checkpoint.folder.resolve()), "files": sizes}
        self._source["format"] = format
        if tuning is not None:
            self._source["adapter"] = tuning.stamp
        try:
            data = json.loads((folder / STATE).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            data = {}
        self.store_id: str = uuid.uuid4().hex
        self.layers: dict[int, StoredLayer] = {}
        if data.get("source") == self._source:
            self.store_id = data["store_id"]
            self.layers = {int(index): layer_from_json(layer) for index, layer in data["layers"].items()}
        else:
            empty(folder)  # of another source, or from before the first layer was whole

    def finished(self, index: int, layer: StoredLayer) -> None:
        self.layers[index] = layer
        layers = {str(key): layer_to_json(value) for key, value in self.layers.items()}
        state = {"source": self._source, "store_id": self.store_id, "layers": layers}
        write_json(self.folder / STATE, state)


def copy_small_files(folder: Path, partial: Path) -> None:
    """Tokenizer, templates and generation config; the config with our mark."""
    for file in folder.iterdir():
        if file.is_file() and not file.name.endswith(_NOT_COPIED) and file.name != "config.json":
            shutil.copyfile(file, partial / file.name)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "melinoe"}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def finish(store: Store, target: Path) -> None:
    """Writes the manifest of a store that stands in its partial folder, and puts the folder in its place.

    A store without a fingerprint, because its routers are not stored as they are, gets it by being loaded.
    """
    if not store.fingerprint:
        write_manifest(store, {})
        store = replace(store, fingerprint=_fingerprint(store.folder))
    write_manifest(store, {"transformers_version": transformers.__version__})
    (store.folder / STATE).unlink(missing_ok=True)
    # an index is made again whenever a shard has changed
    put_folder(store.folder, target, replace=bool(store.shards))


def _fingerprint(folder: Path) -> str:
    """The routing fingerprint of a store that has none yet.

    transformers opens the store by our plug-in (runtime.quantizer).
    """
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {**config.quantization_config, "slots": 0}
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=config.dtype)
    model.melinoe_paged.pager.close()
    return fingerprint(model)
