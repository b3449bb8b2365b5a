"""What every benchmark does alike: arguments, settings of the machine, turns, folders and limits, the result.

Each begins with `begin`, which reads its arguments, and ends with `write_result`, which writes what was
measured beside the hardware, the versions, the commit and the date. Folders and memory limits made here are
removed at the end, also after an error, Ctrl-C or a TERM signal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import melinoe
from melinoe.demonstration.limited_process import MemoryLimit
from melinoe.errors import MelinoeError
from melinoe.files import write_json
from melinoe.report.setting import commit, machine


def parser_of(documentation: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring, with the option that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the arguments; one thread, no hub, TERM ends the program as an error does, and what users can
    cause is said in one line, as the command line says it."""
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminated)
    sys.excepthook = _say
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    return options


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python calls for an error that nobody caught; its own way shows the traceback."""
    if isinstance(error, MelinoeError) and os.environ.get("MELINOE_TRACEBACK") != "1":
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _terminated(number: int, frame: object) -> None:
    print("terminated", file=sys.stderr, flush=True)
    sys.exit(128 + number)


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """A folder in TMPDIR that is gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f"melinoe-{name}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[MemoryLimit]:
    """A memory cgroup that is gone at the end; says so where this machine lets us make none."""
    limit = MemoryLimit(limit_bytes)
    if not limit.available:
        print("no memory cgroup can be made here: running without a limit", file=sys.stderr)
    try:
        yield limit
    finally:
        limit.close()


def run_json(
    command: Sequence[str], limit: MemoryLimit | None = None, **environment: str
) -> dict[str, Any] | None:
    """Runs a command to its end; the JSON of its last line, with its seconds and the peak bytes of the limit.

    Returns:
        None where it was killed, as the kernel does to what goes over the limit.
    """
    use = limit if limit is not None and limit.available else None
    if use is not None:
        use.peak_bytes()  # forgets the peak of whoever ran before
    began = time.perf_counter()
    process = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=use.join if use is not None else None,
        check=False,
    )
    seconds = time.perf_counter() - began
    if process.returncode == -signal.SIGKILL:
        return None
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed with exit code {process.returncode}")
    found: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    return {
        "output": found,
        "seconds": seconds,
        "peak_cgroup_bytes": use.peak_bytes() if use is not None else None,
    }


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name) of contestants that take turns, every second round the other way round.

    So whatever else the machine does meets all of them alike, and none always runs behind the same other.
    """
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            yield number, name


def spread(values: Sequence[float]) -> dict[str, float]:
    """Number, median, quartiles and range of repeated measurements."""
    several = len(values) > 1
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if several else list(values) * 3
    low, middle, high = quartiles
    return {
        "n": len(values),
        "median": middle,
        "q1": low,
        "q3": high,
        "lowest": min(values),
        "highest": max(values),
    }


def written(values: Sequence[float], digits: int = 2) -> str:
    """`median (lowest to highest)`."""
    found = spread(values)
    return (
        f"{found['median']:.{digits}f} ({found['lowest']:.{digits}f} to {found['highest']:.{digits}f})"
        if len(values) > 1
        else f"{found['median']:.{digits}f}"
    )


def close(model: Any) -> None:
    """Ends an offloaded model's reading threads and frees its slots, before the next contestant."""
    model.melinoe_paged.pager.close()


def conditions() -> dict[str, Any]:
    """Where and when: hardware, versions, commit, date, and how busy the machine was at the end."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        **machine(),
        "melinoe": melinoe.__version__,
        "gpu": gpu,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": list(os.getloadavg()),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_result(options: argparse.Namespace, **measured: Any) -> None:
    """Writes {"benchmark", "settings", "conditions", what was measured} to --output, where it was given."""
    if options.output is None:
        return
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
    }
    result = {
        "benchmark": Path(sys.argv[0]).stem,
        "settings": settings,
        "conditions": conditions(),
        **measured,
    }
    write_json(options.output, result, indent=1, default=float)
