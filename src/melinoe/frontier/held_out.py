"""Held-out rows for a comparison: what is measured was never trained on, and is the same for all.

Test splits of small data sets are small. So the end of each train split can be set aside as well, and
several folders become one: train without its held-out end, and test with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, TypeVar

from melinoe.data import files
from melinoe.data.rows import read_records, read_rows, resolve_data
from melinoe.errors import MelinoeError
from melinoe.files import write_text

Item = TypeVar("Item")


class Split(NamedTuple):
    """What is trained on and what is measured on.

    train, test: lines of JSON as they stand in the files. origin: the source of every test line.
    """

    train: list[str]
    test: list[str]
    origin: list[str]


def hold_out(sources: list[str | Path], number: int, limit: int | None) -> Split:
    """Train and held-out rows of several sources.

    Args:
        sources: data folders, .jsonl files (all of whose rows are then train rows), or `tiny`.
        number: rows at the end of each train split that are measured on instead of trained on.
        limit: at most this many held-out rows, evenly spaced, so that every source keeps its share.

    Raises:
        MelinoeError: a source without rows, or nothing left to train or to measure on.
    """
    train: list[str] = []
    test: list[tuple[str, str]] = []
    for name in sources:
        source = _local(name)
        rows = _lines(source, "train")
        if number >= len(rows):
            raise MelinoeError(
                f"nothing of {source} is left to train on", got=f"--hold-out {number} of {len(rows)} rows"
            )
        end = len(rows) - number
        train += rows[:end]
        own = _lines(source, "test") if source.is_dir() and files.has_split(source, "test") else []
        test += [(line, str(name)) for line in own + rows[end:]]
    if not test:
        raise MelinoeError(
            "there are no held-out rows",
            allowed="a folder with test.jsonl",
            next_step="or set rows aside: --hold-out N",
        )
    kept = evenly(test, limit)
    return Split(train, [line for line, _ in kept], [name for _, name in kept])


def held_out_only(source: str | Path, limit: int | None) -> list[str]:
    """Lines of a folder's test split or of a .jsonl file."""
    return evenly(_lines(_local(source), "test"), limit)


def evenly(rows: list[Item], limit: int | None) -> list[Item]:
    """Takes at most `limit` of the rows, evenly spaced, in their order."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[position * len(rows) // limit] for position in range(limit)]


def _local(source: str | Path) -> Path:
    path = Path(resolve_data(source))
    if not path.exists():
        raise MelinoeError(
            "no such data", got=source, allowed="a file of rows, a folder of train and test.jsonl, or tiny"
        )
    return path


def _lines(source: Path, split: str) -> list[str]:
    read_rows(source, split)  # a malformed line is named with the user's own file
    records = [record for _, record in read_records(source, split)]
    found = files.split_files(source, split) if source.is_dir() else [source]
    if [file.suffix for file in found] == [".jsonl"]:
        text = found[0].read_text(encoding="utf-8")
        lines = [line for line in text.split("\n") if line.strip()]  # not splitlines: text holds other ends
        if len(lines) == len(records):
            return lines  # as they stand, so that a sweep finds its runs again
    return [json.dumps(record, ensure_ascii=False) for record in records]


def write_split(target: Path, split: str, rows: list[str]) -> None:
    """Writes target/SPLIT.jsonl, whole or not at all."""
    write_text(target / f"{split}.jsonl", "\n".join(rows) + "\n")
