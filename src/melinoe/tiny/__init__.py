"""The embedded model and its data: what `melinoe demo` and the tests run on, without a download.

The model was trained here (`train`) on text generated here (`workload`); both files say how.
Importing this package loads no torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

TRAIN_ROWS, VALID_ROWS, TEST_ROWS = 12000, 600, 4000
DATA_SEED = 0


def model_path() -> Path:
    """The folder of the embedded model, as from_pretrained takes it."""
    return Path(__file__).parent / "model"


def data_path(cache_folder: str | Path | None = None) -> Path:
    """A folder with train, valid and test.jsonl of the workload, written once.

    It lies in `cache_folder`, else $MELINOE_HOME, else ~/.cache/melinoe; its name holds a hash of the
    generator's source, so that another version writes another folder.
    """
    from melinoe.tiny.workload import write_splits

    root = Path(cache_folder or os.environ.get("MELINOE_HOME") or Path.home() / ".cache" / "melinoe")
    digest = hashlib.blake2b(f"{TRAIN_ROWS} {VALID_ROWS} {TEST_ROWS} {DATA_SEED}".encode(), digest_size=6)
    for name in ("workload.py", "tasks_mental.py", "tasks_numbers.py", "tasks_text.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    folder = root / f"tiny-data-{digest.hexdigest()}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix="tiny-data-", suffix=".writing", dir=root))
    stage.chmod(0o755)
    write_splits(stage, TRAIN_ROWS, VALID_ROWS, TEST_ROWS, DATA_SEED)
    try:
        stage.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(stage)
    return folder
