"""What this machine has: free memory, and whether a device can be used."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from melinoe.errors import MelinoeError

if TYPE_CHECKING:  # a plan that was measured before needs no torch
    import torch

_M_MMAP_THRESHOLD = -3  # of malloc.h
RETURNED_BYTES = 2**18  # blocks from this size on are returned
# what oneDNN keeps of one shape of matrix product, the code that it wrote for it (docs/decisions/0014)
KERNEL_BYTES = 3 * 2**18
UNCOUNTED_KERNELS = 128  # kept where no budget counts them; a server with 32 takes 25% more time, docs/log.md


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that this process may still take: of a CUDA device, or of the machine and its cgroup."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return min([available, *(left for _, left in _cgroups())])


def total_memory(device: torch.device | None = None) -> int:
    """Bytes that there are, used or free: of a CUDA device, or of the machine (its cgroup may have less)."""
    if device is not None and device.type == "cuda":
        import torch

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


def resident_memory() -> int:
    """The resident set of this process, in bytes."""
    return _status("VmRSS")


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes.

    Not getrusage: its ru_maxrss begins with what the parent had when it started us.
    """
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
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


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Leaves out the search for circles of garbage, where many objects are made and all of them stay.

    It goes through all that is there again and again: a quarter of the time of an import or an index.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def return_holes() -> None:
    """Makes the C library give back what has been freed, also between what is in use."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def makes_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch computes matrix products there with oneDNN, which writes code for every shape."""
    import torch

    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def kept_kernels(shapes: int, memory: int) -> int:
    """For how many shapes of matrix products oneDNN may keep its code.

    Args:
        shapes: those that one request has.
        memory: a budget of bytes, a tenth of which they may take, but 32 are kept in any.
    """
    return min(shapes, max(32, memory // 10 // KERNEL_BYTES))


def keep_kernels(count: int) -> None:
    """Limits what oneDNN keeps of shapes that it has seen.

    It would keep 1,024, and torch's layer above it as many. Only before the first such product of a process,
    and not where the user has set the variables.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(count))
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")


def usable_device(device: str | torch.device) -> torch.device:
    """The device, checked.

    Raises:
        MelinoeError: neither the CPU nor a CUDA device that is there.
    """
    import torch

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
