"""The embedded model and its data: what `melinoe demo` and the tests run on, without a download.

The model was trained on text that `workload` generates, by the code in tools/tiny_training, which is no part
of the package. Importing this package loads no torch.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from melinoe.files import empty, partial_folder, put_folder

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
    with partial_folder(folder, wait=True) as partial:
        if folder.is_dir():  # another process has made it meanwhile
            return folder
        empty(partial)
        write_splits(partial, TRAIN_ROWS, VALID_ROWS, TEST_ROWS, DATA_SEED)
        put_folder(partial, folder)
    return folder
