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

from melinoe.conversion.checkpoint import Checkpoint
from melinoe.conversion.fold_adapter import Tuning
from melinoe.files import PARTIAL, empty, put_folder, write_json
from melinoe.models.layers import fingerprint
from melinoe.models.pretrained import load_model, read_config
from melinoe.outputs import Kind
from melinoe.store.checksums import stored_file
from melinoe.store.manifest import MANIFEST, Store, StoredFile, write_manifest
from melinoe.store.marking import marked
from melinoe.store.record_file import StoredLayer, layer_from_json, layer_to_json

STATE = "convert-state.json"
STORE = Kind("a store", True, lambda folder: "")  # none is ever replaced, so none is ever recognised
SMALL_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # beside weights; as a Hub id is fetched
_TEMPLATES = "additional_chat_templates"  # a folder, of tokenizers with several templates


class BuildState:
    """What an interrupted call has finished, in one folder, for one source and format.

    Attributes:
        folder: where the store is built.
        format: of the records.
        layers: {layer index: stored layer} of the record files that are whole.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, tuning: Tuning | None, format: str) -> None:
        self.folder, self.format = folder, format
        shards = zip(checkpoint.shards.files, checkpoint.shards.stamps, strict=True)
        sizes = {str(file): [stamp.size, stamp.mtime_ns] for file, stamp in shards}
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


def copy_small_files(
    checkpoint: Checkpoint, partial: Path, resident: str, changes: dict[str, Any] | None = None
) -> None:
    """Tokenizer, templates and generation config; the config with our mark.

    Args:
        resident: the file of the store that holds, or lists, what is not an expert's.
        changes: of the config, by an adapter; None takes a field away.
    """
    folder = checkpoint.folder
    for file in folder.iterdir():
        weights = file.name.endswith(".index.json") or file.name in ("config.json", MANIFEST)
        if file.is_file() and file.suffix in SMALL_FILES and not weights:
            shutil.copyfile(file, partial / file.name)
    if (folder / _TEMPLATES).is_dir():
        shutil.copytree(folder / _TEMPLATES, partial / _TEMPLATES, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for field, value in (changes or {}).items():
        config.pop(field, None)
        if value is not None:
            config[field] = value
    dtype = str(checkpoint.model.config.dtype).removeprefix("torch.")  # type: ignore[union-attr]
    text = json.dumps(marked(config, resident, dtype), indent=2)
    (partial / "config.json").write_text(text + "\n", encoding="utf-8")


def finish(store: Store, target: Path) -> None:
    """Writes the manifest of a store that stands in its partial folder, and puts the folder in its place.

    A store without a fingerprint, because its routers are not stored as they are, gets it by being loaded.
    """
    (store.folder / STATE).unlink(missing_ok=True)
    for leftover in store.folder.glob(f"*{PARTIAL}"):  # of a call that was killed while it wrote a file
        leftover.unlink()
    store = replace(store, files=small_files(store))
    if not store.fingerprint:
        write_manifest(store, {})
        store = replace(store, fingerprint=_fingerprint(store.folder))
    write_manifest(store, {"transformers_version": transformers.__version__})
    # an index is made again whenever a shard has changed
    put_folder(store.folder, target, replace=bool(store.shards))


def small_files(store: Store) -> tuple[StoredFile, ...]:
    """Everything in a store's folder beside records, shards and manifest, with checksums."""
    known = {MANIFEST, *(shard.file for shard in store.shards), *(layer.file for layer in store.layers)}
    found = sorted(file for file in store.folder.iterdir() if file.is_file() and file.name not in known)
    return tuple(stored_file(file) for file in found)


def _fingerprint(folder: Path) -> str:
    """The routing fingerprint of a store that has none yet.

    transformers opens the store by our plug-in (runtime.quantizer).
    """
    config = read_config(folder)
    config.quantization_config = {**config.quantization_config, "slots": 0}
    model = load_model(folder, config=config, dtype=config.dtype)
    model.melinoe_paged.pager.close()
    return fingerprint(model)
