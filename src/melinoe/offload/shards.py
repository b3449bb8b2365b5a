"""Safetensors by their bytes: reads tensors of a checkpoint's shards, and writes a file tensor by tensor.

safetensors' own library maps whole files and saves from tensors that are all in memory. Here a tensor, or
some of its rows, is read when it is asked for and leaves neither a mapping nor page cache behind, and a
file of any size is written with one tensor in memory. The in-place store needs the offsets as well.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.core_model_loading import dot_natural_key

from melinoe.errors import MelinoeError

# names of the safetensors format; those of 4 and 6 bits have no torch dtype and no row that starts at a byte
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor stands: `nbytes` from byte `offset` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Shards:
    """The tensors of a checkpoint folder, by name, read when asked for; no file stays open.

    Raises:
        MelinoeError: no safetensors weights, or a file that is missing, truncated or damaged.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif (folder / "model.safetensors").is_file():
            names = ["model.safetensors"]
        else:
            raise MelinoeError(
                f"{folder} holds no safetensors weights", allowed="model.safetensors or its index"
            )
        self.files = [folder / name for name in names]
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            self.tensors |= _tensors_of(file)

    def names(self) -> list[str]:
        """All names; numbers inside them in natural order."""
        return sorted(self.tensors, key=dot_natural_key)

    def tensor(self, name: str) -> torch.Tensor:
        stored = self.tensors[name]
        return _read(stored, stored.offset, stored.nbytes).view(stored.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop of dimension 0: [stop - start, ...]."""
        stored = self.tensors[name]
        row = stored.nbytes // stored.shape[0]
        rows = _read(stored, stored.offset + start * row, (stop - start) * row)
        return rows.view(stop - start, *stored.shape[1:])


def _tensors_of(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt"):  # checks header, offsets and length against the file
            pass
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(length))
    except Exception as error:
        raise MelinoeError(
            f"cannot read {file}", got=error, next_step="fetch the checkpoint again"
        ) from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise MelinoeError(f"{name} in {file} has a type that torch lacks", got=entry["dtype"])
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(
            file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin, end - begin
        )
    return tensors


def _read(stored: StoredTensor, offset: int, nbytes: int) -> torch.Tensor:
    """Flat tensor of the stored dtype from a range of bytes; nothing of it stays in the page cache."""
    data = torch.empty(nbytes, dtype=torch.uint8)
    view, done = memoryview(data.numpy()), 0
    descriptor = os.open(stored.file, os.O_RDONLY)
    try:
        while done < nbytes:
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise MelinoeError(f"{stored.file} ended early", next_step="fetch the checkpoint again")
            done += count
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise MelinoeError(f"cannot read {stored.file}", got=error) from error
    finally:
        os.close(descriptor)
    return data.view(stored.dtype)


@dataclass(frozen=True)
class Outgoing:
    """A tensor that will be written: what the header must say before the data is made."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Iterable[Outgoing]) -> None:
    """Writes a safetensors file with one tensor in memory at a time; it appears complete or not at all."""
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))  # keeps all aligned
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)

    def write(file: object) -> None:
        file.write(struct.pack("<Q", len(header)) + header)  # type: ignore[attr-defined]
        for tensor in ordered:
            made = tensor.make().contiguous()
            assert made.dtype == tensor.dtype and tuple(made.shape) == tensor.shape, (tensor, made.shape)
            file.write(memoryview(made.flatten().view(torch.uint8).numpy()))  # type: ignore[attr-defined]

    write_whole(path, write)


def write_whole(path: Path, write: Callable[[object], None]) -> None:
    """Runs `write` on a file beside `path` and renames it when all has reached the disk.

    What is written must not sit in the page cache and pass for speed later. On any error, a full disk among
    them, nothing is left.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
