"""`melinoe verify`: reads everything in a store and compares it with its checksums."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from melinoe.store.checksums import stored_file
from melinoe.store.manifest import Store, read_manifest, write_manifest
from melinoe.store.record_file import StoredLayer, record_header

_CHUNK = 4 * 2**20
_KEPT = ("transformers_version",)  # of a manifest, beside what a Store knows


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        damaged: records and other files whose bytes are not those that were written, by name.
        compared: False where no checksums of the experts and shards were known.
    """

    damaged: tuple[str, ...]
    compared: bool


def verify(store: Store) -> Verification:
    """Reads all of a store: records, resident weights, config, tokenizer, templates.

    Of an in-place store's shards there are no checksums before its first check; what is read then is
    remembered for the next one.
    """
    damaged = list(damaged_files(store))
    if not store.shards:
        return Verification((*damaged, *damaged_records(store)), True)
    checksums = [tuple(_checksums_in_place(store, layer)) for layer in store.layers]
    rest = tuple(_rest_checksums(store))
    if not all(layer.checksums for layer in store.layers) or not store.rest_checksums:
        layers = zip(store.layers, checksums, strict=True)
        known = tuple(replace(layer, checksums=found) for layer, found in layers)
        manifest = read_manifest(store.folder)
        kept = {name: manifest[name] for name in _KEPT if name in manifest}
        write_manifest(replace(store, layers=known, rest_checksums=rest), kept)
        return Verification(tuple(damaged), False)
    damaged += [
        f"expert {expert} of {layer.experts_name}"
        for layer, found in zip(store.layers, checksums, strict=True)
        for expert, (one, expected) in enumerate(zip(found, layer.checksums, strict=True))
        if one != expected
    ]
    damaged += [
        f"{shard.file}: what is no expert's"
        for shard, found, expected in zip(store.shards, rest, store.rest_checksums, strict=True)
        if found != expected
    ]
    return Verification(tuple(damaged), True)


def damaged_files(store: Store) -> Iterator[str]:
    """Names every file beside the records that is not as it was written."""
    for file in store.files:
        path = store.folder / file.name
        if not path.is_file():
            yield f"{file.name} is missing"
        elif stored_file(path) != file:
            yield file.name


def damaged_records(store: Store) -> Iterator[str]:
    """Names every record of a converted store, and header of its files, that is not as it was written."""
    for index, layer in enumerate(store.layers):
        with (store.folder / layer.file).open("rb") as file:
            header = record_header(store.store_id, index, layer.num_experts, layer.layout.record_bytes)
            if file.read(layer.data_start) != header:
                yield f"{layer.file}: its header"
            for expert in range(layer.num_experts):
                if zlib.crc32(file.read(layer.layout.record_bytes)) != layer.checksums[expert]:
                    yield f"{layer.file}: expert.{expert} ({layer.experts_name})"


def _checksums_in_place(store: Store, layer: StoredLayer) -> Iterator[int]:
    """CRC-32 of each expert's pieces, one after the other."""
    for sources in layer.sources:
        checksum = 0
        for (_, length), (shard, start) in zip(layer.pieces, sources):
            checksum = _checksum(store.folder / store.shards[shard].file, start, length, checksum)
        yield checksum


def _rest_checksums(store: Store) -> Iterator[int]:
    """Of each shard, CRC-32 of what lies between the experts' pieces: header, resident weights."""
    taken: list[list[tuple[int, int]]] = [[] for _ in store.shards]
    for layer in store.layers:
        for sources in layer.sources:
            for (_, length), (number, start) in zip(layer.pieces, sources):
                taken[number].append((start, start + length))
    for shard, pieces in zip(store.shards, taken):
        checksum, position = 0, 0
        for start, end in [*sorted(pieces), (shard.size, shard.size)]:
            if start > position:
                checksum = _checksum(store.folder / shard.file, position, start - position, checksum)
            position = max(position, end)
        yield checksum


def _checksum(path: Path, start: int, length: int, checksum: int) -> int:
    """CRC-32 of a range of a file, carried on from `checksum`; nothing of it stays in the page cache."""
    with path.open("rb") as file:
        file.seek(start)
        left = length
        while left and (chunk := file.read(min(_CHUNK, left))):
            checksum = zlib.crc32(chunk, checksum)
            left -= len(chunk)
        os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)
    return checksum
