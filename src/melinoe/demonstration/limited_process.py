"""A module in a process of its own, under a memory limit that counts the page cache as well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from melinoe.errors import MelinoeError
from melinoe.files import write_json

_CGROUP = Path("/sys/fs/cgroup/memory")


class MemoryLimit:
    """A memory cgroup (v1) for child processes; `available` says whether this machine lets us make one."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.folder = _CGROUP / f"melinoe-{os.getpid()}"
        try:
            self.folder.mkdir()
            (self.folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
            self.available = True
        except OSError:
            self.available = False

    def join(self) -> None:
        """Called by the child before it allocates anything."""
        (self.folder / "tasks").write_text(str(os.getpid()))

    def peak_bytes(self) -> int:
        peak = int((self.folder / "memory.max_usage_in_bytes").read_text())
        (self.folder / "memory.max_usage_in_bytes").write_text("0")
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
