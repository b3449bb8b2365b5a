"""Text rows: what tune, trace, evaluate and demo read.

A data set is a file (files.py), a folder with one file for each split, the id of one on the Hugging Face Hub
(hub.py), or `tiny`, the embedded workload. What its columns mean is detected row by row (columns.py), and
encoding.py makes tokens of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from melinoe.data import files
from melinoe.data import hub as hub_data
from melinoe.data.columns import Row, parse_row
from melinoe.data.files import SPLITS
from melinoe.errors import MelinoeError

ALLOWED = (
    f"a file ({files.ALLOWED}), a folder with one for each of {', '.join(SPLITS)},"
    " the Hub id of a data set, or tiny"
)


def resolve_data(source: str | Path) -> str | Path:
    """The folder of the embedded workload for `tiny`, which is made on first use; anything else as it is."""
    if str(source) != "tiny":
        return source
    from melinoe.tiny import data_path

    return data_path()


def read_records(path: str | Path, split: str = "train", limit: int | None = None) -> Iterator[files.Record]:
    """The records of a data set as they stand there, each with its place. Arguments as of `read_rows`."""
    if not str(split).strip():
        raise MelinoeError("the split has no name", allowed=", ".join(SPLITS))
    path = resolve_data(path)
    if not Path(path).exists() and hub_data.is_id(str(path)):
        return hub_data.read(str(path), split, limit)
    path = Path(path)
    if path.is_dir():
        if hub_data.is_saved(path):
            return hub_data.read_saved(path, split, limit)
        found = files.split_files(path, split)
    elif path.is_file():
        if files.split_of(split) not in SPLITS:
            raise MelinoeError(
                f"{path} is one file, which has no split {split}",
                allowed=f"{', '.join(SPLITS)} (a single file is read whole)",
            )
        found = [path]
    else:
        raise MelinoeError("no such data file or folder", got=path, allowed=ALLOWED)
    return islice(chain.from_iterable(map(files.records, found)), limit)


def read_rows(path: str | Path, split: str = "train", limit: int | None = None) -> list[Row]:
    """Rows of a file, or of one split of a folder or of a data set on the Hub.

    Args:
        path: a file (then `split` chooses nothing), a folder with one for each split, a Hub id, or `tiny`.
        split: which part of a folder or data set; valid is found as validation, dev or val too.
        limit: at most this many rows, from the start.

    Raises:
        MelinoeError: no such file, a record that is no row (named with file and line), or no rows.
    """
    rows = [parse_row(record, where) for where, record in read_records(path, split, limit)]
    if not rows:
        raise MelinoeError(f"{path} has no rows", allowed="at least one JSON line")
    return rows


def data_rows(data: Any, split: str, limit: int | None) -> list[Row]:
    """Rows of a path (`read_rows`), or the first of a list of rows."""
    return read_rows(data, split, limit) if isinstance(data, str | Path) else list(data)[:limit]


def describe_rows(rows: Iterable[Row]) -> str:
    """`400 rows of prompt + completion, 12 of text; not used: id, source`: what was detected."""
    rows = list(rows)
    counts = Counter(row.kind for row in rows)
    parts = [
        f"{count:,} {'row' if count == 1 else 'rows'}" + (f" of {kind}" if kind else "")
        for kind, count in counts.most_common()
    ]
    unused = Counter(name for row in rows for name in row.unused)
    return ", ".join(parts) + (f"; columns not used: {', '.join(unused)}" if unused else "")
