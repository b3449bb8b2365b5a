"""Few bfloat16 rows by a matrix at the speed of memory, where the machine has a C compiler.

torch hands such a product to oneDNN, which takes 13 microseconds before it begins, and on some processors
reads weights at a quarter of the memory's speed. few_rows.c is compiled for the machine on first use and kept
in $MELINOE_HOME/kernels. It needs no memory worth counting and no library; numba, which does the same,
takes 107 MiB of a process (docs/log.md).

Which kernel computes a row is a matter of the number of rows, of dtype, shapes and threads alone, for paged
and resident experts alike. Without a compiler, or with MELINOE_COMPILED=0, all of it is torch's.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import activations
from transformers.integrations import moe

from melinoe.config import home

FEW_ROWS = 8  # more are torch's, whose matrix instructions win from about six on (docs/log.md)
FEW_SMALL, SMALL = 16, 2**19  # rows by a matrix of fewer weights, where torch wins from about 16 on
LARGE = 2**20  # weights from which on a matrix is divided among torch's number of threads
SOURCE = Path(__file__).with_name("few_rows.c")
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", "-w")
_SECONDS = 60  # after which a compiler is given up

_library: Any = None  # once it was asked for and has been found to compute what it should
_asked = False


def prepare() -> bool:
    """Compiles the kernels, or finds them compiled; whether they are there.

    Called where a model is opened, so that no token waits for it. What it found holds for the process.
    """
    global _library, _asked
    if not _asked:
        _library, _asked = _found(), True
    return _library is not None


def _found() -> Any:
    if os.environ.get("MELINOE_COMPILED", "1") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return None
    try:
        library = _opened(_built(compiler))
    except (OSError, subprocess.SubprocessError, AttributeError):  # a compiler that cannot, a full disk, ...
        return None
    rows, weight = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(3, 3, dtype=torch.bfloat16)
    library.melinoe_product(rows.data_ptr(), weight.data_ptr(), out.data_ptr(), 3, 70, 3, 0, 3)
    expected = rows.double() @ weight.double().T
    return library if torch.allclose(out.double(), expected, rtol=2**-7, atol=2**-5) else None


def _built(compiler: str) -> Path:
    """The shared library, compiled unless this compiler has compiled this source on this processor before.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be compiled or written.
    """
    source, program = SOURCE.read_bytes(), Path(compiler).resolve()
    stamp = f"{program} {program.stat().st_mtime_ns} {_FLAGS} {_processor()}"
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
            command = [compiler, *_FLAGS, *native, str(SOURCE), "-o", partial, "-lm"]
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


def _opened(path: Path) -> Any:
    library = ctypes.CDLL(str(path))  # releases the lock of the interpreter while it computes
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.melinoe_product.argtypes = [pointer] * 3 + [number] * 5
    library.melinoe_gated.argtypes = [pointer] * 4 + [number] * 4
    return library


def few(rows: torch.Tensor) -> bool:
    """Whether rows [N, in] are such as the kernels compute, where the matrix is."""
    return (
        _library is not None
        and 0 < len(rows) <= FEW_SMALL
        and rows.dtype == torch.bfloat16
        and rows.device.type == "cpu"
        and not (rows.requires_grad and torch.is_grad_enabled())
        and rows.is_contiguous()
    )


def few_rows(module: nn.Module, hidden: torch.Tensor) -> int:
    """Up to so many rows of an experts module need not be rounded up in number; 0: torch computes all.

    hidden: of which they are rows.
    """
    own_way = module.is_transposed or "expert_forward" in vars(module)
    return FEW_ROWS if few(hidden[:1]) and not own_way else 0


def _fits(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and (len(rows) <= FEW_ROWS or weight.numel() < SMALL)
        and weight.is_contiguous()
        and not (weight.requires_grad and torch.is_grad_enabled())
    )


def _divided(weight: torch.Tensor) -> bool:
    return weight.numel() >= LARGE and torch.get_num_threads() > 1


def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """rows [N, in], for which `few` is true, by a matrix [out, in] -> [N, out]; None where it is torch's."""
    if not _fits(rows, weight):
        return None
    (count, size_in), size_out = rows.shape, len(weight)
    out = rows.new_empty(count, size_out)
    given = rows.data_ptr(), weight.data_ptr(), out.data_ptr(), count, size_in, size_out
    if not _divided(weight):
        return _whole(out, _library.melinoe_product(*given, 0, size_out))
    threads = torch.get_num_threads()
    step = -(-size_out // (4 * threads)) * 4  # outputs stay in their fours, so the sums are the same
    rest = [
        _pool(threads - 1, os.getpid()).submit(
            partial(_library.melinoe_product, *given, at, min(at + step, size_out))
        )
        for at in range(step, size_out, step)
    ]
    failed = _library.melinoe_product(*given, 0, min(step, size_out))
    return _whole(out, failed + sum(part.result() for part in rest))


@cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Of one process: a fork has none of its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="melinoe-rows")


def gated(rows: torch.Tensor, ups: list[torch.Tensor], downs: list[torch.Tensor]) -> torch.Tensor | None:
    """Whole experts with silu on the same rows [N, H], for which `few` is true; None: step by step.

    ups: [2 * I, H] of each of E experts, the gate's half first. downs: [H, I].

    Returns:
        [E * N, H], expert by expert.
    """
    if not all(_fits(rows, weight) for weight in (*ups, *downs)) or _divided(ups[0]):
        return None
    (count, hidden), inner, experts = rows.shape, downs[0].shape[1], len(ups)
    out = rows.new_empty(experts * count, hidden)
    pointers = ctypes.c_void_p * experts
    failed = _library.melinoe_gated(
        rows.data_ptr(),
        pointers(*(up.data_ptr() for up in ups)),
        pointers(*(down.data_ptr() for down in downs)),
        out.data_ptr(),
        experts,
        count,
        hidden,
        inner,
    )
    return _whole(out, failed)


def _whole(out: torch.Tensor, failed: int) -> torch.Tensor:
    if failed:  # torch would do it with other roundings
        raise MemoryError("no memory for a row of an expert")
    return out


def is_gated_silu(module: nn.Module) -> bool:
    """Whether an expert is down(silu(gate(x)) * up(x)) of matrices [out, in]; of an experts module."""
    default = getattr(moe, "_default_apply_gate", None)
    gate = vars(module).get("_apply_gate", getattr(type(module), "_apply_gate", None))
    silu = type(getattr(module, "act_fn", None)) in (nn.SiLU, activations.SiLUActivation)
    plain = not (module.has_bias or module.is_transposed or module.has_post_expert_norm)
    return bool(silu and plain and module.has_gate and gate is not None and gate is default)
