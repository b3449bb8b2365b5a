"""CRC-32 of whole files, read once and left out of the page cache."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from melinoe.store.manifest import StoredFile

_CHUNK = 4 * 2**20


def stored_file(path: Path) -> StoredFile:
    """A file as a manifest remembers it."""
    checksum, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return StoredFile(path.name, size, checksum)
