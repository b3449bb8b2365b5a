"""One MoE layer of a store: where its records are, and the file they are written to.

A record file is ordinary safetensors, so any tool can read it: each record is one U8 tensor that includes its
padding, and the header is padded with spaces, which puts every record on a 4 KiB boundary of the file.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from melinoe.config import RECORD_ALIGNMENT
from melinoe.files import to_disk, whole_file
from melinoe.store.layout import RecordLayout
from melinoe.store.packing import Packing
from melinoe.store.shards import header_bytes

FORMAT, RECORDS_VERSION = "melinoe-store", 1  # of a record file, whatever the manifest's


def record_file_name(layer: int) -> str:
    return f"experts-{layer:05d}.safetensors"


@dataclass(frozen=True)
class StoredLayer:
    """One MoE layer on disk. layout: of a record as it is stored. checksums: CRC-32 of each record.

    packing: how the layout follows from the module's own; None: it is the module's own.
    In place: `pieces` are (place in the record, bytes), the same for every expert of the layer, and `sources`
    says for each expert where each piece stands: (number of the shard, byte offset). Checksums are of the
    pieces, one after the other, and may not be known yet.
    identity: of packed records, the digest of what they were packed from (melinoe.models.identity).
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
    identity: str = ""

    @classmethod
    def unwritten(
        cls, experts_name: str, num_experts: int, layout: RecordLayout, packing: Packing | None = None
    ) -> StoredLayer:
        """A layer that no file holds yet."""
        return cls(experts_name, "", num_experts, layout, 0, (), packing=packing)

    def offset(self, expert: int) -> int:
        return self.data_start + expert * self.layout.record_bytes

    @property
    def file_bytes(self) -> int:
        return self.offset(self.num_experts)


def record_header(store_id: str, layer: int, num_experts: int, record_bytes: int) -> bytes:
    """A safetensors header, padded with spaces so that the data begins on a record boundary."""
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": str(RECORDS_VERSION),
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
    return header_bytes(entries, RECORD_ALIGNMENT)


def write_layer(
    folder: Path, index: int, store_id: str, layer: StoredLayer, records: Iterable[Any]
) -> StoredLayer:
    """Writes one record file, complete or not at all.

    Args:
        index: of the layer, which names the file.
        layer: what is to be written (see `StoredLayer.unwritten`).
        records: one bytes-like of `layout.record_bytes` per expert, in order; taken one at a time.

    Returns:
        The layer with its file, and the checksums of its records.
    """
    num_experts, record_bytes = layer.num_experts, layer.layout.record_bytes
    header = record_header(store_id, index, num_experts, record_bytes)
    path = folder / record_file_name(index)
    checksums = []
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(header)
        for record in records:
            assert len(record) == record_bytes
            checksums.append(zlib.crc32(record))
            file.write(record)
        to_disk(file)
        assert len(checksums) == num_experts, (len(checksums), num_experts)
    return replace(layer, file=path.name, data_start=len(header), checksums=tuple(checksums))


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
        **({"identity": layer.identity} if layer.identity else {}),
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
        str(data.get("identity", "")),
    )
