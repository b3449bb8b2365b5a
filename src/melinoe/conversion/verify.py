"""`melinoe verify`: reads every record of a store and compares it with its checksum."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from melinoe.files import write_json
from melinoe.store.manifest import MANIFEST, Store
from melinoe.store.record_file import StoredLayer, layer_to_json


@dataclass(frozen=True)
class Verification:
    """What was found.

    damaged: names of records. compared: False where no checksums were known before.
    """

    damaged: tuple[str, ...]
    compared: bool


def verify(store: Store) -> Verification:
    """Reads every record of a store.

    Of an in-place store there are no checksums before its first check; what is read then is remembered for
    the next one.
    """
    if not store.shards:
        return Verification(tuple(damaged_records(store)), True)
    checksums = [tuple(_checksums_in_place(store, layer)) for layer in store.layers]
    if not all(layer.checksums for layer in store.layers):
        _remember(store, checksums)
        return Verification((), False)
    damaged = [
        f"expert {expert} of {layer.experts_name}"
        for layer, found in zip(store.layers, checksums, strict=True)
        for expert, (one, expected) in enumerate(zip(found, layer.checksums, strict=True))
        if one != expected
    ]
    return Verification(tuple(damaged), True)


def damaged_records(store: Store) -> Iterator[str]:
    """Names every record of a converted store whose bytes do not match the manifest's checksum."""
    for layer in store.layers:
        with (store.folder / layer.file).open("rb") as file:
            file.seek(layer.data_start)
            for expert in range(layer.num_experts):
                if zlib.crc32(file.read(layer.layout.record_bytes)) != layer.checksums[expert]:
                    yield f"{layer.file}: expert.{expert} ({layer.experts_name})"


def _checksums_in_place(store: Store, layer: StoredLayer) -> Iterator[int]:
    """CRC-32 of each expert's pieces, one after the other."""
    for sources in layer.sources:
        checksum = 0
        for (_, length), (shard, start) in zip(layer.pieces, sources):
            with (store.folder / store.shards[shard].file).open("rb") as file:
                file.seek(start)
                checksum = zlib.crc32(file.read(length), checksum)
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)
        yield checksum


def _remember(store: Store, checksums: list[tuple[int, ...]]) -> None:
    """Puts the checksums of an in-place store into its manifest, whole or not at all."""
    path = store.folder / MANIFEST
    manifest = json.loads(path.read_text())
    layers = zip(store.layers, checksums, strict=True)
    manifest["layers"] = [layer_to_json(replace(layer, checksums=found)) for layer, found in layers]
    write_json(path, manifest)
