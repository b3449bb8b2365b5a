"""An open file that weights are read from, past the page cache.

That somebody wrote to it never goes unnoticed.

What is open stays readable when the file is deleted or another is renamed over it; only writing into the same
file could change what an expert is in the middle of a generation.
"""

from __future__ import annotations

import os
from pathlib import Path


class WeightsFile:
    """One file, opened with O_DIRECT where the file system allows it (`direct`).

    size, mtime_ns: as it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor, self.direct = os.open(path, os.O_RDONLY | os.O_DIRECT), True
        except OSError:  # tmpfs and others have no O_DIRECT
            self.descriptor, self.direct = os.open(path, os.O_RDONLY), False
        status = os.fstat(self.descriptor)
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns

    def read(self, destination: memoryview, offset: int) -> None:
        """Fills `destination` from `offset` on.

        Where `direct`, address, offset and length are multiples of 4 KiB.

        Raises:
            OSError: it cannot be read, or it ends before.
        """
        done, length = 0, len(destination)
        while done < length:
            count = os.preadv(self.descriptor, [destination[done:]], offset + done)
            if count == 0:
                raise OSError(f"{self.path} ended early")
            done += count
        if not self.direct:
            os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def check(self) -> None:
        """Called after reading: what was read before a change was noticed is not to be used.

        Raises:
            OSError: the file was written to since it was opened.
        """
        status = os.fstat(self.descriptor)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise OSError(f"{self.path.resolve()} has changed while it was in use")

    def close(self) -> None:
        os.close(self.descriptor)
