"""The store: a transformers model folder whose experts are records on disk.

    config.json          the model's config; quantization_config names melinoe, so from_pretrained opens it
    model*.safetensors   everything but the experts, under the checkpoint's own names
    experts-00000.safetensors ...  one file per MoE layer; each expert is one U8 tensor `expert.N`
    melinoe.json         the manifest: format version, fingerprint, layouts, checksums

An in-place store has no record files: its manifest says which bytes of the checkpoint's own shards, which
stand in the folder as links, make up each record (see in_place.py).

record_file.py says what stands in a record file.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from melinoe.errors import MelinoeError
from melinoe.files import write_json
from melinoe.store.record_file import FORMAT, FORMAT_VERSION, StoredLayer, layer_from_json, layer_to_json
from melinoe.store.shards import Stamp, check_stamp, read_header

PACKED_VERSION = 2  # of a store with packed records, which a reader of version 1 must refuse
IN_PLACE_FORMAT = "melinoe-store-in-place"
MANIFEST = "melinoe.json"


@dataclass(frozen=True)
class Store:
    """An opened store; nothing of the experts has been read.

    shards: of an in-place store, links in the folder.
    """

    folder: Path
    fingerprint: str
    store_id: str
    layers: tuple[StoredLayer, ...]
    source: str = ""
    shards: tuple[Stamp, ...] = ()

    def __deepcopy__(self, _: Any) -> Store:
        return self  # frozen, and large; a model's config that carries it is copied by transformers

    @property
    def max_record_bytes(self) -> int:
        return max(layer.layout.record_bytes for layer in self.layers)

    @property
    def record_format(self) -> str:
        """auto (the model's own dtype), int8 or int4."""
        packing = self.layers[0].packing if self.layers else None
        return packing.format if packing is not None else "auto"

    @property
    def expert_bytes(self) -> int:
        """Bytes of all records, padding included."""
        return sum(layer.num_experts * layer.layout.record_bytes for layer in self.layers)

    @property
    def expanded_bytes(self) -> int:
        """Bytes that the records would have in the model's own dtype."""
        layouts = [layer.packing.expanded if layer.packing else layer.layout for layer in self.layers]
        return sum(
            layer.num_experts * layout.record_bytes
            for layer, layout in zip(self.layers, layouts, strict=True)
        )

    def path(self, layer: int) -> Path:
        """Where the layer's records are; in place: its first shard."""
        stored = self.layers[layer]
        return self.folder / (self.shards[stored.sources[0][0][0]].file if stored.sources else stored.file)


def is_store(folder: Path | str) -> bool:
    """Whether a folder says that it is a store (it may still be a broken one)."""
    return (Path(folder) / MANIFEST).is_file()


def write_manifest(store: Store, extra: dict[str, Any]) -> None:
    """Writes melinoe.json, complete or not at all."""
    manifest = {
        "format": IN_PLACE_FORMAT if store.shards else FORMAT,
        "format_version": FORMAT_VERSION if store.record_format == "auto" else PACKED_VERSION,
        "record_format": store.record_format,
        "fingerprint": store.fingerprint,
        "store_id": store.store_id,
        "source": store.source,
        **extra,
        **(
            {"shards": [asdict(shard) for shard in store.shards], "index_crc": _index_crc(store)}
            if store.shards
            else {}
        ),
        "layers": [layer_to_json(layer) for layer in store.layers],
    }
    write_json(store.folder / MANIFEST, manifest, indent=None if store.shards else 1)


def _index_crc(store: Store) -> int:
    """CRC-32 of what an in-place store's index says: a wrong offset would be read as weights."""
    index = [
        [layer.experts_name, layer.num_experts, layer.layout.to_json(), layer.pieces, layer.sources]
        for layer in store.layers
    ]
    return zlib.crc32(json.dumps(index).encode())


def open_store(folder: Path | str) -> Store:
    """Opens a store and checks that its files are there, whole, and belong together.

    Raises:
        MelinoeError: not a store, another format version, a missing or truncated record file, or a
            record file of another store.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise MelinoeError(
            f"{folder} is not a melinoe store",
            got=f"no {MANIFEST}",
            next_step="make one with: melinoe convert",
        ) from None
    except json.JSONDecodeError as error:
        raise MelinoeError(
            f"{folder / MANIFEST} is damaged", got=error.msg, next_step="convert again"
        ) from None
    known = {FORMAT: (FORMAT_VERSION, PACKED_VERSION), IN_PLACE_FORMAT: (FORMAT_VERSION,)}
    if manifest.get("format_version") not in known.get(manifest.get("format"), ()):
        raise MelinoeError(
            f"{folder} has another store format",
            got=f"{manifest.get('format')} {manifest.get('format_version')}",
            allowed=f"{FORMAT} {FORMAT_VERSION} or {PACKED_VERSION}",
            next_step="convert again with this version of melinoe",
        )
    layers = tuple(layer_from_json(layer) for layer in manifest["layers"])
    shards = tuple(Stamp(**shard) for shard in manifest.get("shards", ()))
    source = manifest.get("source", "")
    store = Store(folder, manifest["fingerprint"], manifest["store_id"], layers, source, shards)
    if shards and manifest.get("index_crc") != _index_crc(store):
        raise MelinoeError(
            f"{folder / MANIFEST} is damaged",
            got="an index that does not match its checksum",
            next_step="load the checkpoint by its own name again: the index is made anew",
        )
    for shard in shards:
        check_stamp(folder, shard)
    for index, layer in enumerate(layers):
        if layer.sources:
            continue
        path = folder / layer.file
        if not path.is_file():
            raise MelinoeError("a record file is missing", got=path, next_step="convert again")
        size = path.stat().st_size
        if size != layer.file_bytes:
            raise MelinoeError(
                f"record file {path} is truncated or damaged",
                got=f"{size} bytes",
                allowed=f"{layer.file_bytes} bytes",
                next_step="convert again",
            )
        metadata = read_header(path, next_step="convert again").metadata
        if metadata.get("store_id") != store.store_id or metadata.get("layer") != str(index):
            raise MelinoeError(
                f"record file {path} belongs to another store",
                got=f"store {metadata.get('store_id')} layer {metadata.get('layer')}",
                allowed=f"store {store.store_id} layer {index}",
                next_step="convert again",
            )
    return store
