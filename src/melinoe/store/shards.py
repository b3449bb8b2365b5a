"""Safetensors files by their bytes: where each tensor of a checkpoint stands, read when asked for.

Tensors are read with pread into memory of their own, not mapped: what a mapping has touched counts as
resident until the kernel takes it back, and a checkpoint may be larger than memory. The same byte ranges
are what an in-place store points at.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from melinoe.errors import MelinoeError
from melinoe.files import to_disk, whole_file

# the format's names of dtypes
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype, shape, and its bytes [start, start + nbytes) in the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Stamp:
    """What a file was when it was indexed. Times in nanoseconds; header_crc: CRC-32 of the header's bytes."""

    file: str
    size: int
    mtime_ns: int
    ctime_ns: int
    header_crc: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself; `metadata` are the strings beside the tensors."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    stamp: Stamp


def read_header(path: Path, next_step: str = "fetch the checkpoint again") -> Header:
    """The header of a safetensors file; no tensor is read.

    Raises:
        MelinoeError: missing, truncated or damaged; `next_step` is what helps then.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
            text = file.read(length) if length <= _MAX_HEADER else b""
        header = json.loads(text)
        metadata = dict(header.pop("__metadata__", {}))
        entries = {name: _entry(path, 8 + length, status.st_size, data) for name, data in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MelinoeError(f"cannot read {path}", got=error, next_step=next_step) from None
    return Header(entries, metadata, _stamp(path, status, text))


def _stamp(path: Path, status: os.stat_result, header: bytes) -> Stamp:
    return Stamp(path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, zlib.crc32(header))


def read_stamp(path: Path) -> Stamp:
    """What a file is now; its header is read and not parsed, which for thousands of tensors takes a second.

    Raises:
        MelinoeError: it cannot be read, or is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            status, start = os.fstat(file.fileno()), file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
            if length > _MAX_HEADER:
                raise ValueError("no header")
            return _stamp(path, status, file.read(length))
    except (OSError, ValueError) as error:
        raise MelinoeError(f"cannot read {path}", got=error, next_step="fetch the checkpoint again") from None


def header_bytes(header: dict[str, Any], alignment: int) -> bytes:
    """A header as it stands in the file; spaces bring what follows to a multiple of `alignment`."""
    text = json.dumps(header, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // alignment) * alignment - 8
    return struct.pack("<Q", length) + text.ljust(length)


def _entry(path: Path, data_start: int, size: int, data: dict[str, Any]) -> Entry:
    begin, end = data["data_offsets"]
    shape = tuple(data["shape"])
    if data["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {data['dtype']}")
    dtype = DTYPES[data["dtype"]]
    if not 0 <= begin <= end or math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError("a tensor's shape and bytes disagree")
    if data_start + end > size:
        raise ValueError(f"the file is truncated: {size} bytes, its header promises {data_start + end}")
    return Entry(path, dtype, shape, data_start + begin, end - begin)


class Shards:
    """The tensors of safetensors files, by name, read when asked for.

    Of a name that several files have, the last one counts, as for `from_pretrained`.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.stamps: list[Stamp] = []
        self.entries: dict[str, Entry] = {}
        self.repeated: set[str] = set()  # names that several files have
        for file in self.files:
            header = read_header(file)
            self.repeated |= self.entries.keys() & header.entries.keys()
            self.entries |= header.entries
            self.stamps.append(header.stamp)

    def names(self) -> list[str]:
        """All names; numbers inside them in natural order."""
        from transformers.core_model_loading import dot_natural_key

        return sorted(self.entries, key=dot_natural_key)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        entry = self.entries[name]
        return read_bytes(entry.path, entry.start, entry.nbytes).view(entry.dtype).view(entry.shape)

    def start(self, name: str, count: int) -> torch.Tensor:
        """The first elements of a tensor, in one dimension; no other is read."""
        entry = self.entries[name]
        return read_bytes(entry.path, entry.start, count * entry.dtype.itemsize).view(entry.dtype)

    def part(self, name: str, index: int, count: int) -> torch.Tensor:
        """The part `index` of `count` equal ones of a tensor's first dimension; no other part is read."""
        entry = self.entries[name]
        nbytes = entry.nbytes // count
        data = read_bytes(entry.path, entry.start + index * nbytes, nbytes)
        return data.view(entry.dtype).view(entry.shape[0] // count, *entry.shape[1:])


def read_bytes(path: Path, start: int, nbytes: int) -> torch.Tensor:
    """[nbytes] uint8; nothing of it stays in the page cache."""
    data = torch.empty(nbytes, dtype=torch.uint8)
    view, done = memoryview(data.numpy()), 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while done < nbytes:
            count = os.preadv(descriptor, [view[done:]], start + done)
            if count == 0:
                raise MelinoeError(
                    f"{path} ended early", got=f"{start + done} bytes", next_step="fetch it again"
                )
            done += count
        os.posix_fadvise(descriptor, start, nbytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return data


def write_file(
    path: Path,
    described: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Writes a safetensors file, whole or not at all, one tensor at a time.

    `save_file` would hold all of them twice.

    Args:
        described: dtype and shape of every tensor, in the order of the file: larger elements first, so
            that each tensor stands at a multiple of its element (see `file_order`).
        tensors: the same names in the same order; taken one at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in described.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    written = []
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(header_bytes(header, 64))
        for name, tensor in tensors:
            assert (tensor.dtype, tuple(tensor.shape)) == described[name], (name, tensor.dtype, tensor.shape)
            file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
            written.append(name)
        to_disk(file)
        assert written == list(described), "a tensor is missing, or they came in another order"


def file_order(
    described: dict[str, tuple[torch.dtype, tuple[int, ...]]],
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Larger elements first, otherwise as given."""
    return dict(sorted(described.items(), key=lambda item: -item[1][0].itemsize))


def check_stamp(folder: Path, stamp: Stamp) -> None:
    """Refuses a file that is not the one that was indexed.

    Raises:
        MelinoeError: it is gone, or its size, times or header are others.
    """
    path = folder / stamp.file
    again = "load the checkpoint by its own name again: the index is made anew"
    if not path.is_file():
        raise MelinoeError(
            "a shard of the checkpoint is missing", got=f"{path} -> {path.resolve()}", next_step=again
        )
    status = path.stat()
    found = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if found != (stamp.size, stamp.mtime_ns, stamp.ctime_ns) or read_stamp(path) != stamp:
        raise MelinoeError(
            f"the shard {path.resolve()} has changed since it was indexed",
            got=_times(*found),
            allowed=f"{_times(stamp.size, stamp.mtime_ns, stamp.ctime_ns)}, and the same header",
            next_step=again,
        )


def _times(size: int, mtime_ns: int, ctime_ns: int) -> str:
    return f"{size} bytes, written at {mtime_ns} ns, put there at {ctime_ns} ns"
