"""Where a comparison takes place: the machine, the shape of the model, the data it is run on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from melinoe.errors import MelinoeError


def data_folder(model: str, data: str | Path | None) -> Path:
    """The folder of splits; the embedded workload for `tiny` without one.

    Raises:
        MelinoeError: no folder, or none given for another model.
    """
    if data is not None:
        folder = Path(data)
        if not folder.is_dir():
            raise MelinoeError(
                "there is no such data folder", got=folder, allowed="one with train, valid and test.jsonl"
            )
        return folder
    if model != "tiny":
        raise MelinoeError(
            "--data is missing",
            allowed="a folder of train, valid and test.jsonl",
            next_step="give one, or --model tiny, which brings its own",
        )
    from melinoe.tiny import data_path

    return data_path()


def name_of(source: str | Path) -> str:
    """What a page calls a model or data: of a folder its own name; where it lies says nothing elsewhere."""
    try:
        is_path = os.path.isabs(source) or os.path.exists(source)
    except (OSError, ValueError):  # no name that a file could have
        is_path = False
    return Path(os.path.abspath(source)).name or str(source) if is_path else str(source)


def commit() -> str | None:
    """The commit that this package is run from, marked where files differ from it; None outside of git.

    A repository that merely lies around the package is none of ours: it must know this very file.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        for command in (["ls-files", "--error-unmatch", Path(__file__).name], ["rev-parse", "HEAD"]):
            said = subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return said + (" and changes" if changed.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
