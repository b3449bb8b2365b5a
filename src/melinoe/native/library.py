"""Kernels in C, compiled for this machine on first use and kept in $MELINOE_HOME/kernels.

They need no library and no memory worth counting; numba, which does the same, takes 107 MiB of a process
(docs/log.md). Without a compiler, or with MELINOE_COMPILED=0, there are none, and torch computes everything.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, partial
from pathlib import Path
from typing import Any

from melinoe.config import home

_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-w")
_SECONDS = 60  # after which a compiler is given up
_OF_A_TOKEN = ("few_rows.c", "program.c", "packed_rows.c")


_begun: dict[str, Future[Path | None]] = {}  # by the name of a source


def begin() -> None:
    """Compiles what a token is computed with in another thread, while this one imports torch.

    `opened` waits for what it asks for. Where all was compiled before, there is nothing to do.
    """
    if _begun:
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="melinoe-compile")
    _begun.update({name: pool.submit(_there, name, True) for name in _OF_A_TOKEN})
    pool.shutdown(wait=False)


def opened(name: str, contract: bool = True) -> ctypes.CDLL | None:
    """The library of a source beside this file, such as few_rows.c; None where it cannot be had.

    Its functions release the lock of the interpreter while they compute.

    Args:
        contract: a product and the sum it goes into may be rounded once, as processors do it fastest.
    """
    if name in _begun:
        wait([_begun[name]])
    file = _there(name, contract)
    try:
        return None if file is None else ctypes.CDLL(str(file))
    except OSError:
        return None


def _there(name: str, contract: bool) -> Path | None:
    """The compiled file; None where it cannot be had."""
    if os.environ.get("MELINOE_COMPILED", "1") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return None
    flags = (*_FLAGS, f"-ffp-contract={'fast' if contract else 'off'}")
    try:
        return _built(compiler, Path(__file__).with_name(name), flags)
    except (OSError, subprocess.SubprocessError):  # a compiler that cannot, a full disk, ...
        return None


def brief(function: Any) -> Any:
    """The same function, but no other thread of Python runs meanwhile: for what takes microseconds."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    return ctypes.PYFUNCTYPE(function.restype, *function.argtypes)(address)  # type: ignore[arg-type]


def _built(compiler: str, source_file: Path, flags: tuple[str, ...]) -> Path:
    """The shared library, compiled unless this compiler has compiled this source on this processor before.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be compiled or written.
    """
    header = source_file.with_name("bfloat16.h")
    source, program = header.read_bytes() + source_file.read_bytes(), Path(compiler).resolve()
    stamp = f"{program} {program.stat().st_mtime_ns} {flags} {_processor()}"
    name = hashlib.sha256(source + stamp.encode()).hexdigest()[:24]
    folder = home() / "kernels"
    target = folder / f"{name}.so"
    if _is_ours(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        for native in (["-march=native"], ["-mcpu=native"], []):  # not every compiler knows its own machine
            command = [compiler, *flags, *native, str(source_file), "-o", partial, "-lm"]
            done = subprocess.run(command, capture_output=True, timeout=_SECONDS)
            if done.returncode == 0:
                os.chmod(partial, 0o700)
                os.replace(partial, target)  # several processes may do this at once, to the same end
                return target
        done.check_returncode()
        raise AssertionError
    finally:
        Path(partial).unlink(missing_ok=True)


def _is_ours(file: Path) -> bool:
    """Whether a file is there that nobody but us can have written: it will be run."""
    try:
        found = file.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022 and found.st_size > 0


def _processor() -> str:
    """What code for this machine may use: another machine with the same home must not run it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = [platform.processor()]
    known = sorted(line for line in lines if line.split("\t")[0] in ("flags", "Features", "model name"))
    return f"{platform.machine()} {platform.libc_ver()} {known or lines}"


def in_parts(compute: Callable[[int, int], int], size_out: int, multiple: int, threads: int) -> None:
    """Computes the outputs of a matrix, or some experts, on some threads.

    compute: (first output, the one behind the last) -> 0, or 1 where it failed. multiple: of outputs that are
    computed together, so that parts have the sums that the whole would have.

    Raises:
        MemoryError: a call failed. Nothing else may compute it then: torch has other roundings.
    """
    step = -(-size_out // (multiple * threads)) * multiple
    rest = [
        _pool(threads - 1, os.getpid()).submit(partial(compute, at, min(at + step, size_out)))
        for at in range(step, size_out, step)
    ]
    failed = compute(0, min(step, size_out))
    if failed + sum(part.result() for part in rest):
        raise MemoryError("no memory for a row of an expert")


@cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Of one process: a fork has none of its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="melinoe-rows")
