"""What this machine has: free memory, and whether a device can be used."""

from __future__ import annotations

from pathlib import Path

import torch

from melinoe.errors import MelinoeError


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that this process may still take: of a CUDA device, or of the machine and its cgroup."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            available = min(available, int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return available


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes.

    Not getrusage: its ru_maxrss begins with what the parent had when it started us.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def usable_device(device: str | torch.device) -> torch.device:
    """The device, checked.

    Raises:
        MelinoeError: neither the CPU nor a CUDA device that is there.
    """
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise MelinoeError("unknown device", got=device, allowed="cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise MelinoeError("no CUDA device on this machine", got=device, allowed="cpu")
    if chosen.type not in ("cpu", "cuda"):
        raise MelinoeError("unsupported device", got=device, allowed="cpu, cuda or cuda:N")
    return chosen
