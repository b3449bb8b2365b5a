"""What this machine has: free memory, and whether a device can be used."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

from melinoe.errors import MelinoeError

_M_MMAP_THRESHOLD = -3  # of malloc.h
RETURNED_BYTES = 2**18  # blocks from this size on are returned


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that this process may still take: of a CUDA device, or of the machine and its cgroup."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return min([available, *(left for _, left in _cgroups())])


def total_memory(device: torch.device | None = None) -> int:
    """Bytes that there are, used or free: of a CUDA device, or of the machine (its cgroup may have less)."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return min([int(line.split()[1]) * 1024, *(limit for limit, _ in _cgroups())])
    raise AssertionError("no MemTotal in /proc/meminfo")


def _cgroups() -> Iterator[tuple[int, int]]:
    """(limit, what is left of it) of each memory cgroup above this process.

    Page cache that the kernel can take back counts as left.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):  # version 1
            base, limit, usage, cache = "memory", "limit_in_bytes", "usage_in_bytes", "total_inactive_file"
        elif not controllers:  # version 2
            base, limit, usage, cache = "", "max", "current", "inactive_file"
        else:
            continue
        root = Path("/sys/fs/cgroup") / base
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            try:
                most, used = (int((folder / f"memory.{name}").read_text()) for name in (limit, usage))
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield most, most - used + int(counts.get(cache, 0))
            except (OSError, ValueError):  # no such folder or controller here, or "max"
                pass
            if folder == root:
                break


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes.

    Not getrusage: its ru_maxrss begins with what the parent had when it started us.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def return_freed_memory() -> None:
    """Makes the C library give large blocks back to the system as soon as they are freed, from now on.

    glibc learns from what is freed and soon keeps blocks of up to 32 MiB for itself; in the holes between
    what a forward pass keeps and what it drops that was measured as 45 percent more than the activations
    (docs/log.md). No other library and no other system is asked.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, RETURNED_BYTES)


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
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        found = ", ".join(f"cuda:{number}" for number in range(torch.cuda.device_count()))
        raise MelinoeError("no such CUDA device on this machine", got=device, allowed=f"cpu, cuda, {found}")
    if chosen.type not in ("cpu", "cuda"):
        raise MelinoeError("unsupported device", got=device, allowed="cpu, cuda or cuda:N")
    return chosen
