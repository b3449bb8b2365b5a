"""A module in a process of its own, under a memory limit that counts the page cache as well."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from melinoe.errors import MelinoeError
from melinoe.files import write_json

# (folder, limit, peak, members) of the memory controller, version 1 and 2
_CONTROLLERS = (
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes", "tasks"),
    ("/sys/fs/cgroup", "memory.max", "memory.peak", "cgroup.procs"),
)


class MemoryLimit:
    """A memory cgroup for child processes; `available` says whether this machine lets us make one."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.available = False
        for root, *names in _CONTROLLERS:
            try:  # a name that nobody has: one of ours may be left over, or be in use for another child
                self.folder = Path(tempfile.mkdtemp(prefix="melinoe-", dir=root))
            except OSError:
                continue
            self._limit, self._peak, self._members = (self.folder / name for name in names)
            try:
                self.set_limit(limit_bytes)
                self.available = True
                return
            except OSError:  # this hierarchy does not control memory
                self.folder.rmdir()

    def set_limit(self, limit_bytes: int) -> None:
        """Raises OSError where that is not allowed."""
        self._limit.write_text(str(limit_bytes))

    def join(self) -> None:
        """Called by the child before it allocates anything."""
        self._members.write_text(str(os.getpid()))

    def peak_bytes(self) -> int:
        """Since the last time that it was asked; with version 2 of cgroups, since the beginning."""
        peak = int(self._peak.read_text())
        with contextlib.suppress(OSError):
            self._peak.write_text("0")
        return peak

    def close(self) -> None:
        if not self.available:
            return
        for _ in range(50):  # the kernel takes a moment to let go of a child that has ended
            try:
                self.folder.rmdir()
                return
            except OSError:
                time.sleep(0.1)


def run_module(
    module: str, task: dict[str, Any], file: Path, limit: MemoryLimit | None, what: str
) -> dict[str, Any]:
    """Runs `python -m MODULE TASK.json` to its end and returns what its last line says, an object of JSON.

    Args:
        task: what it is to do; written to `file`.
        limit: that it runs under; None: none.
        what: its name in the message where it fails.

    Raises:
        MelinoeError: it failed; the end of what it printed is in the message.
    """
    write_json(file, task)
    process = subprocess.run(
        [sys.executable, "-m", module, str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=limit.join if limit else None,
        check=False,
    )
    if process.returncode != 0:
        reason = "killed: out of memory" if process.returncode == -9 else process.stderr.strip()[-300:]
        raise MelinoeError(f"the run of {what} failed", got=reason)
    return json.loads(process.stdout.strip().splitlines()[-1])
