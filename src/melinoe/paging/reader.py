"""What the pager asks of whatever moves records: three classes do, and each may stand on another.

DiskReader       the store's files -> host memory                                  (disk_reader.py)
DeviceReader     pinned host memory, filled by a DiskReader -> device memory       (device_reader.py)
ExpandingReader  packed records of one of those two -> records of full size        (expansion.py)
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol

import torch

READER_THREADS = 4  # reads in flight; a disk needs several to reach its bandwidth


class Reader(Protocol):
    """Moves records of a store into memory, several at a time, in any order."""

    @property
    def device(self) -> torch.device:
        """Where `read` writes to."""

    @property
    def bytes_read(self) -> int:
        """Bytes moved so far, as they lie in the store: padding included, packed records packed."""

    @property
    def busy_seconds(self) -> float:
        """Time in which at least one read of the disk was outstanding; with its bytes, the bandwidth."""

    def read(self, layer: int, expert: int, destination: torch.Tensor) -> Future[Any]:
        """Starts moving one record into `destination` (a record long, uint8, on `device`).

        The future is done when the record is in host memory, or when its copy to the device is under way; its
        result is for `arrived`. It raises MelinoeError where the record could not be read.
        """

    def arrived(self, result: Any) -> None:
        """Orders what the caller computes from now on behind a record's arrival; the host does not wait."""

    def drain(self) -> None:
        """Returns when no read is under way on the host, also one whose future was lost to an exception."""

    def close(self) -> None:
        """Ends the threads and closes the files; `read` must not be called again."""
