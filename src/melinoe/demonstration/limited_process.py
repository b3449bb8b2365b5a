"""Runs contestants: each in a process of its own, all under one memory limit, page cache included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from melinoe.config import DEFAULT_POLICY
from melinoe.errors import MelinoeError

_CGROUP = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True)
class Contestant:
    """One row of the speed table.

    kind: "resident" (stock transformers), "accelerate" (disk_offload of the experts) or "melinoe".
    weights: which weights it runs: base, control or tuned; rows of equal weights must agree on every token.
    max_prompts, max_new_tokens: caps for slow rows; None: as all others.
    """

    name: str
    kind: str
    weights: str
    model: str
    slots: int | None = None
    policy: str = DEFAULT_POLICY
    predictor: str | None = None
    offload_folder: str | None = None
    max_prompts: int | None = None
    max_new_tokens: int | None = None
    limited: bool = True
    prompts: list[list[int]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class MemoryLimit:
    """A memory cgroup (v1) for the contestants; `available` says whether this machine lets us make one."""

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


def run_contestant(contestant: Contestant, limit: MemoryLimit | None, folder: Path) -> dict[str, Any]:
    """Runs one contestant to its end and returns what it measured.

    Raises:
        MelinoeError: it failed; the end of what it printed is in the message.
    """
    task = folder / "contestant.json"
    task.write_text(json.dumps(contestant.to_json()))
    use = limit if limit is not None and limit.available and contestant.limited else None
    process = subprocess.run(
        [sys.executable, "-m", "melinoe.demonstration.run_contestant", str(task)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=use.join if use else None,
        check=False,
    )
    if process.returncode != 0:
        reason = "killed: out of memory" if process.returncode == -9 else process.stderr.strip()[-300:]
        raise MelinoeError(f"the run of {contestant.name!r} failed", got=reason)
    result: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    result["memory_limit_bytes"] = use.limit_bytes if use else None
    return result
