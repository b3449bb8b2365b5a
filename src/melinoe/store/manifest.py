"""The store: a transformers model folder whose experts are records on disk.

    config.json           the model's config, marked so that only melinoe opens it (marking.py)
    resident.safetensors  everything but the experts, under the checkpoint's own names
    experts-00000.safetensors ...  one file per MoE layer; each expert is one U8 tensor `expert.N`
    melinoe.json          the manifest: format version, fingerprint, layouts, checksums of everything

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
from melinoe.store.record_file import FORMAT, StoredLayer, layer_from_json, layer_to_json
from melinoe.store.shards import Stamp, check_stamp, read_header

FORMAT_VERSION = 3
UPGRADABLE = (1, 2)  # of converted stores: they could be opened without melinoe, and nobody saw to it
IN_PLACE_FORMAT = "melinoe-store-in-place"
MANIFEST = "melinoe.json"
RESIDENT = "resident.safetensors"
RESIDENT_INDEX = "resident.safetensors.index.json"  # of an in-place store
_MAX_MANIFEST = 100_000_000  # bytes; one of 46,000 tensors in place has 2 million
_AGAIN = "load the checkpoint by its own name again: the index is made anew"


class OldStoreError(MelinoeError):
    """A store of an older format, which can be upgraded (melinoe.conversion.upgrade)."""


@dataclass(frozen=True)
class StoredFile:
    """A file beside the records. crc: CRC-32 of its bytes."""

    name: str
    size: int
    crc: int


@dataclass(frozen=True)
class Store:
    """An opened store; nothing of the experts has been read.

    Attributes:
        folder: where it is.
        fingerprint: of the model's routing.
        store_id: random, the same in every record file.
        layers: its MoE layers.
        source: the checkpoint, as it was named.
        shards: of an in-place store, links in the folder.
        files: everything beside records, shards and manifest.
        rest_checksums: of an in-place store, for each shard CRC-32 of what is no expert's; empty until the
            first `melinoe verify`.
        check_reads: compare each record with its checksum when it is first read.
    """

    folder: Path
    fingerprint: str
    store_id: str
    layers: tuple[StoredLayer, ...]
    source: str = ""
    shards: tuple[Stamp, ...] = ()
    files: tuple[StoredFile, ...] = ()
    rest_checksums: tuple[int, ...] = ()
    check_reads: bool = False

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
    in_place = {"shards": [asdict(shard) for shard in store.shards], "rest_checksums": store.rest_checksums}
    manifest = {
        "format": IN_PLACE_FORMAT if store.shards else FORMAT,
        "format_version": FORMAT_VERSION,
        "record_format": store.record_format,
        "fingerprint": store.fingerprint,
        "store_id": store.store_id,
        "source": store.source,
        **extra,
        "files": [asdict(file) for file in store.files],
        **(in_place if store.shards else {}),
        "layers": [layer_to_json(layer) for layer in store.layers],
    }
    write_json(store.folder / MANIFEST, sealed(manifest), indent=None if store.shards else 1)


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with its own checksum: a wrong offset would be read as weights."""
    content = {key: value for key, value in manifest.items() if key != "crc"}
    return {**content, "crc": zlib.crc32(json.dumps(content, sort_keys=True).encode())}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What melinoe.json says; only that it is a manifest has been checked.

    Raises:
        MelinoeError: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        with path.open("r") as file:
            text = file.read(_MAX_MANIFEST + 1)
        if len(text) > _MAX_MANIFEST:
            raise ValueError(f"more than {_MAX_MANIFEST} bytes")
        manifest = json.loads(text)
        if not isinstance(manifest, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        raise MelinoeError(
            f"{folder} is not a melinoe store",
            got=f"no {MANIFEST}",
            next_step="make one with: melinoe convert",
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise MelinoeError(f"{path} is damaged", got=error, next_step="convert again") from None
    return manifest


def open_store(folder: Path | str) -> Store:
    """Opens a store and checks that its files are there, whole, and belong together.

    Raises:
        OldStoreError: of an older format.
        MelinoeError: not a store, another format version, a damaged manifest, a missing or truncated file,
            a record file of another store, or a name that leads out of the folder.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_version(folder, manifest)
    if sealed(manifest) != manifest:
        in_place = manifest["format"] == IN_PLACE_FORMAT
        raise MelinoeError(
            f"{folder / MANIFEST} is damaged",
            got="a manifest that does not match its checksum",
            next_step=_AGAIN if in_place else "convert again",
        )
    store = store_from(folder, manifest)
    for shard in store.shards:
        check_stamp(folder, shard)
    for file in store.files:
        if file.name == RESIDENT:
            _check_size(folder / file.name, file.size)
    if not store.shards:
        for index, layer in enumerate(store.layers):
            _check_record_file(store, index, layer)
    return store


def _check_version(folder: Path, manifest: dict[str, Any]) -> None:
    found = manifest.get("format"), manifest.get("format_version")
    if found in ((FORMAT, FORMAT_VERSION), (IN_PLACE_FORMAT, FORMAT_VERSION)):
        return
    old = found[0] == FORMAT and found[1] in UPGRADABLE
    next_step = "convert again with this version of melinoe"
    if old:
        next_step = "open it once with melinoe.load or melinoe generate, which upgrade it"
    elif found[0] == IN_PLACE_FORMAT and isinstance(found[1], int) and found[1] < FORMAT_VERSION:
        next_step = _AGAIN
    raise (OldStoreError if old else MelinoeError)(
        f"{folder} has another store format",
        got=f"{found[0]} {found[1]}",
        allowed=f"{FORMAT} or {IN_PLACE_FORMAT} {FORMAT_VERSION}",
        next_step=next_step,
    )


def store_from(folder: Path, manifest: dict[str, Any]) -> Store:
    """The store that a manifest describes.

    Nothing that it says is believed: names are of files in the folder, numbers stay inside of them.

    Raises:
        MelinoeError: it does not describe one.
    """
    try:
        store = Store(
            folder,
            str(manifest["fingerprint"]),
            str(manifest["store_id"]),
            tuple(layer_from_json(layer) for layer in manifest["layers"]),
            str(manifest.get("source", "")),
            tuple(Stamp(**shard) for shard in manifest.get("shards", ())),
            tuple(StoredFile(**file) for file in manifest.get("files", ())),
            tuple(manifest.get("rest_checksums", ())),
        )
        names = [file.name for file in store.files] + [shard.file for shard in store.shards]
        for name in names if store.shards else [*names, *(layer.file for layer in store.layers)]:
            _check_name(folder, name)
        for layer in store.layers:
            _check_numbers(store, layer)
        if not store.layers:
            raise ValueError("no layers")
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        if isinstance(error, MelinoeError):
            raise
        raise MelinoeError(
            f"{folder / MANIFEST} is damaged",
            got=f"{type(error).__name__}: {error}",
            next_step="convert again",
        ) from None
    return store


def _check_name(folder: Path, name: str) -> None:
    if name in ("", ".", "..") or "\0" in name or name != Path(name).name:
        raise MelinoeError(
            f"{folder / MANIFEST} names a file outside of the store",
            got=name,
            next_step="do not use this store unless you know who made it",
        )


def _check_numbers(store: Store, layer: StoredLayer) -> None:
    """Raises ValueError where a layer's numbers contradict each other or point outside of a file."""
    if layer.num_experts < 1 or layer.layout.record_bytes < 1 or layer.data_start < 0:
        raise ValueError(f"{layer.experts_name} has no experts")
    if layer.checksums and len(layer.checksums) != layer.num_experts:
        raise ValueError(f"{len(layer.checksums)} checksums of {layer.num_experts} experts")
    if bool(layer.sources) != bool(store.shards) or (not store.shards and not layer.checksums):
        raise ValueError(f"{layer.experts_name} is neither in files of its own nor in place")
    if layer.sources and len(layer.sources) != layer.num_experts:
        raise ValueError(f"{len(layer.sources)} places of {layer.num_experts} experts")
    sizes, lengths = [shard.size for shard in store.shards], [length for _, length in layer.pieces]
    for place, length in layer.pieces:
        if not 0 <= place <= place + length <= layer.layout.record_bytes:
            raise ValueError(f"a piece of {layer.experts_name} does not fit its record")
    for one in layer.sources:
        for (shard, start), length in zip(one, lengths, strict=True):
            if not 0 <= shard < len(sizes) or not 0 <= start <= start + length <= sizes[shard]:
                raise ValueError(f"a piece of {layer.experts_name} is outside of its shard")


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise MelinoeError("a file of the store is missing", got=path, next_step="convert again")
    found = path.stat().st_size
    if found != size:
        raise MelinoeError(
            f"{path} is truncated or damaged",
            got=f"{found} bytes",
            allowed=f"{size} bytes",
            next_step="convert again",
        )


def _check_record_file(store: Store, index: int, layer: StoredLayer) -> None:
    path = store.folder / layer.file
    _check_size(path, layer.file_bytes)
    metadata = read_header(path, next_step="convert again").metadata
    if metadata.get("store_id") != store.store_id or metadata.get("layer") != str(index):
        raise MelinoeError(
            f"record file {path} belongs to another store",
            got=f"store {metadata.get('store_id')} layer {metadata.get('layer')}",
            allowed=f"store {store.store_id} layer {index}",
            next_step="convert again",
        )
