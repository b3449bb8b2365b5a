"""The store: a transformers model folder whose experts are records on disk.

    config.json          the model's config; quantization_config names melinoe, so from_pretrained opens it
    model*.safetensors   everything but the experts, under the checkpoint's own names
    experts-00000.safetensors ...  one file per MoE layer; each expert is one U8 tensor `expert.N`
    melinoe.json         the manifest: format version, fingerprint, layouts, checksums

An in-place store has no record files: its manifest says which bytes of the checkpoint's own shards, which
stand in the folder as links, make up each record (see in_place.py).

The record files are ordinary safetensors, so any tool can read them: each record includes its padding
and the header is padded with spaces, which puts every record on a 4 KiB boundary of the file.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from melinoe.config import RECORD_ALIGNMENT
from melinoe.errors import MelinoeError
from melinoe.offload.formats import Packing
from melinoe.offload.layout import RecordLayout
from melinoe.offload.shards import Stamp, check_stamp

FORMAT, FORMAT_VERSION = "melinoe-store", 1
PACKED_VERSION = 2  # of a store with packed records, which a reader of version 1 must refuse
IN_PLACE_FORMAT = "melinoe-store-in-place"
MANIFEST = "melinoe.json"


def record_file_name(layer: int) -> str:
    return f"experts-{layer:05d}.safetensors"


@dataclass(frozen=True)
class StoredLayer:
    """One MoE layer on disk. layout: of a record as it is stored. checksums: CRC-32 of each record.

    packing: how the layout follows from the module's own; None: it is the module's own.
    In place: `pieces` are (place in the record, bytes), the same for every expert of the layer, and `sources` says
    for each expert where each piece stands: (number of the shard, byte offset). Checksums are of the pieces, one
    after the other, and may not be known yet.
    """

    experts_name: str
    file: str
    num_experts: int
    layout: RecordLayout
    data_start: int  # byte offset of record 0
    checksums: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...] = ()
    sources: tuple[tuple[tuple[int, int], ...], ...] = ()
    packing: Packing | None = None

    def offset(self, expert: int) -> int:
        return self.data_start + expert * self.layout.record_bytes

    @property
    def file_bytes(self) -> int:
        return self.offset(self.num_experts)


@dataclass(frozen=True)
class Store:
    """An opened store; nothing of the experts has been read. shards: of an in-place store, links in the folder."""

    folder: Path
    fingerprint: str
    store_id: str
    layers: tuple[StoredLayer, ...]
    source: str = ""
    shards: tuple[Stamp, ...] = ()

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


def _header(store_id: str, layer: int, num_experts: int, record_bytes: int) -> bytes:
    """A safetensors header, padded with spaces so that the data begins on a record boundary."""
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": str(FORMAT_VERSION),
            "store_id": store_id,
            "layer": str(layer),
        }
    }
    for expert in range(num_experts):
        start = expert * record_bytes
        entries[f"expert.{expert}"] = {
            "dtype": "U8",
            "shape": [record_bytes],
            "data_offsets": [start, start + record_bytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    total = -(-(8 + len(text)) // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
    return struct.pack("<Q", total - 8) + text.ljust(total - 8)


def write_layer(
    folder: Path,
    layer: int,
    store_id: str,
    experts_name: str,
    num_experts: int,
    layout: RecordLayout,
    records: Iterable[Any],
    packing: Packing | None = None,
) -> StoredLayer:
    """Writes one record file, complete or not at all.

    Args:
        records: one bytes-like of `layout.record_bytes` per expert, in order; taken one at a time.
        packing: how they are packed, for the manifest.
    """
    header = _header(store_id, layer, num_experts, layout.record_bytes)
    path = folder / record_file_name(layer)
    partial = path.with_suffix(".partial")
    checksums = []
    with partial.open("wb") as file:
        file.write(header)
        for record in records:
            assert len(record) == layout.record_bytes
            checksums.append(zlib.crc32(record))
            file.write(record)
        file.flush()
        os.fsync(file.fileno())
        # what has been written must not sit in the page cache and pass for speed later
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert len(checksums) == num_experts, (len(checksums), num_experts)
    partial.replace(path)
    return StoredLayer(
        experts_name, path.name, num_experts, layout, len(header), tuple(checksums), packing=packing
    )


def layer_to_json(layer: StoredLayer) -> dict[str, Any]:
    in_place = {"pieces": layer.pieces, "sources": layer.sources} if layer.sources else {}
    return {
        **in_place,
        "experts_name": layer.experts_name,
        "file": layer.file,
        "num_experts": layer.num_experts,
        "data_start": layer.data_start,
        "layout": layer.layout.to_json(),
        "checksums": list(layer.checksums),
        **({} if layer.packing is None else {"packing": layer.packing.to_json()}),
    }


def layer_from_json(data: dict[str, Any]) -> StoredLayer:
    layout = RecordLayout.from_json(data["layout"])
    return StoredLayer(
        data["experts_name"],
        data["file"],
        data["num_experts"],
        layout,
        data["data_start"],
        tuple(data["checksums"]),
        tuple((place, length) for place, length in data.get("pieces", ())),
        tuple(tuple((shard, start) for shard, start in one) for one in data.get("sources", ())),
        Packing.from_json(data["packing"]) if "packing" in data else None,
    )


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
    partial = store.folder / (MANIFEST + ".partial")
    partial.write_text(json.dumps(manifest, indent=None if store.shards else 1))
    partial.replace(store.folder / MANIFEST)


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
        metadata = read_metadata(path)
        if metadata.get("store_id") != store.store_id or metadata.get("layer") != str(index):
            raise MelinoeError(
                f"record file {path} belongs to another store",
                got=f"store {metadata.get('store_id')} layer {metadata.get('layer')}",
                allowed=f"store {store.store_id} layer {index}",
                next_step="convert again",
            )
    return store


def read_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file; empty where the header cannot be read."""
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return {}
        length = struct.unpack("<Q", start)[0]
        if length > 100_000_000:
            return {}
        try:
            return dict(json.loads(file.read(length)).get("__metadata__", {}))
        except (json.JSONDecodeError, UnicodeDecodeError):
            return {}


def damaged_records(store: Store) -> Iterator[str]:
    """Names every record whose bytes do not match the manifest's checksum; reads the whole store.

    In-place stores: see `in_place.checked_records`.
    """
    for layer in store.layers:
        with (store.folder / layer.file).open("rb") as file:
            file.seek(layer.data_start)
            for expert in range(layer.num_experts):
                if zlib.crc32(file.read(layer.layout.record_bytes)) != layer.checksums[expert]:
                    yield f"{layer.file}: expert.{expert} ({layer.experts_name})"
