"""Files of rows: which file holds a split, and the records in it, each with the place where it stands.

jsonl, JSON arrays, csv and tsv are read here, with or without gzip, because here a fault can be named by file
and line and nothing is guessed: a csv cell is the text that stands in it ("NA" and "007" too). parquet, and
folders that the datasets library saved, are read by that library (docs/decisions/0011).
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from melinoe.errors import MelinoeError

SPLITS = ("train", "valid", "test")
# what files and the Hub call our splits
SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "dev", "val"), "test": ("test",)}
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
ALLOWED = "jsonl, JSON array, csv, tsv (each also as .gz) or parquet"
_FILE = re.compile(r"(?P<name>\w+?)(?P<shard>-\d+-of-\d+)?(?P<kind>\.\w+)(?P<gzip>\.gz)?")
_LONGEST_CELL = 2**31 - 1  # csv refuses cells of more than 131,072 characters where nobody says otherwise
_OTHER_TEXT = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}

Record = tuple[str, Any]  # where it stands ("FILE, line 3"), and what stands there


def split_of(name: str) -> str:
    """Our name of a split: `validation`, `dev` and `val` are valid; others stay as they are."""
    return next((split for split, names in SPLIT_NAMES.items() if name in names), name)


def split_files(folder: Path, split: str) -> list[Path]:
    """The file of one split in a folder or its data/, or the shards of it (train-00000-of-00002.parquet).

    Raises:
        MelinoeError: none, or more than one that could be it.
    """
    candidates, seen = _candidates(folder, split)
    if len(candidates) > 1:
        raise MelinoeError(
            f"{folder}: more than one file may be the split {split}",
            got=", ".join(Path(name).name for name in candidates),
            next_step="leave one of them, or give the file itself",
        )
    if not candidates:
        raise MelinoeError(
            f"no {split}.jsonl in data folder {folder}",
            got=", ".join(seen) or "no data files",
            allowed=f"{' | '.join(SPLIT_NAMES.get(split_of(split), (split,)))} as {ALLOWED}",
        )
    return next(iter(candidates.values()))


def has_split(folder: Path, split: str) -> bool:
    """Whether `split_files` finds something, or more than it should."""
    return bool(_candidates(folder, split)[0])


def _candidates(folder: Path, split: str) -> tuple[dict[str, list[Path]], list[str]]:
    """({what may be the split: its files}, all data files that were seen)."""
    names = SPLIT_NAMES.get(split_of(split), (split,))
    found: dict[str, list[Path]] = {}
    seen = []
    for file in [*sorted(folder.iterdir()), *sorted((folder / "data").glob("*"))]:
        match = _FILE.fullmatch(file.name)
        if match is None or match["kind"] not in ENDINGS or not file.is_file():
            continue
        seen.append(str(file.relative_to(folder)))
        if match["name"] in names:
            group = f"{file.parent / match['name']}{'-*' * bool(match['shard'])}{match['kind']}"
            found.setdefault(group + (match["gzip"] or ""), []).append(file)
    return found, seen


def records(file: Path) -> Iterator[Record]:
    """The records of a file, in order.

    Raises:
        MelinoeError: not UTF-8, not JSON, not such a table, damaged; named with the line where there is one.
    """
    with file.open("rb") as opened:
        start = opened.read(6)
        opened.seek(0)
        if start[:4] == b"PAR1":
            yield from _parquet(file)
        elif start[:2] == b"\x1f\x8b":
            with gzip.open(opened) as unpacked:
                yield from _text(file, unpacked, file.name.removesuffix(".gz"))
        elif file.suffix == ".parquet":
            raise MelinoeError(f"{file} is not a parquet file", got=repr(start))
        else:
            yield from _text(file, opened, file.name)


def _text(file: Path, opened: Iterable[bytes], name: str) -> Iterator[Record]:
    if name.endswith((".csv", ".tsv")):
        return _table(file, opened, "\t" if name.endswith(".tsv") else ",")
    return _json(file, opened)


def lines(file: Path, opened: Iterable[bytes]) -> Iterator[str]:
    """The lines of an open file as text, their ends included; a byte order mark is no part of the first.

    Raises:
        MelinoeError: a line that is not UTF-8, or a damaged gzip file.
    """
    number = 0
    try:
        for number, line in enumerate(opened, 1):
            if number == 1 and line[:2] in _OTHER_TEXT:
                name = _OTHER_TEXT[line[:2]]
                raise MelinoeError(
                    f"{file} is {name} text", allowed="UTF-8", next_step=_convert_from(name, file)
                )
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise MelinoeError(
            f"{file}, line {number}: not UTF-8",
            got=f"byte 0x{error.object[error.start]:02x} at {error.start + 1}",
            next_step=_convert_from("latin1", file) + " where it is latin-1, as most such files are",
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise MelinoeError(f"{file} is damaged after line {number}", got=str(error)) from None


def _convert_from(encoding: str, file: Path) -> str:
    return f"convert it: iconv -f {encoding} -t utf-8 '{file}' > new{''.join(file.suffixes)}"


def _json(file: Path, opened: Iterable[bytes]) -> Iterator[Record]:
    """One object per line, or one array of objects."""
    waiting, begun = lines(file, opened), False
    for number, line in enumerate(waiting, 1):
        if not line.strip():
            continue
        if not begun and line.lstrip().startswith("["):
            yield from _array(file, line, waiting, number)
            return
        begun = True
        yield f"{file}, line {number}", _parsed(line, f"{file}, line {number}")


def _array(file: Path, first: str, rest: Iterable[str], number: int) -> Iterator[Record]:
    try:
        found = json.loads("".join([first, *rest]))
    except json.JSONDecodeError as error:
        raise MelinoeError(
            f"{file}, line {error.lineno + number - 1}: not JSON",
            got=error.msg,
            allowed="an array of objects",
        ) from None
    except RecursionError:
        raise MelinoeError(f"{file}: nested too deep to be rows") from None
    for position, record in enumerate(found, 1):
        yield f"{file}, row {position}", record


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise MelinoeError(
            f"{where}: not JSON", got=error.msg, allowed="one object per line, or one array of objects"
        ) from None
    except RecursionError:
        raise MelinoeError(f"{where}: nested too deep to be a row") from None


def _table(file: Path, opened: Iterable[bytes], delimiter: str) -> Iterator[Record]:
    """A csv file with its names in the first line; every cell is text."""
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(lines(file, opened), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            where, start = f"{file}, line {start}", reader.line_num + 1
            if not cells:
                continue
            if names is None:
                names = _header(cells, where, delimiter)
            elif len(cells) != len(names):
                raise MelinoeError(
                    f"{where}: the line has {len(cells)} cells", allowed=f"{len(names)}, as in the first line"
                )
            else:
                yield where, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise MelinoeError(f"{file}, line {reader.line_num}: not a csv line", got=str(error)) from None


def _header(names: list[str], where: str, delimiter: str) -> list[str]:
    names = [name.strip() for name in names]
    if len(names) == 1 and any(other in names[0] for other in ";\t|,"):
        raise MelinoeError(
            f"{where}: there is only one column", got=names[0], allowed=f"names parted by {delimiter!r}"
        )
    if len(set(names)) < len(names):
        raise MelinoeError(f"{where}: two columns have the same name", got=", ".join(names))
    return names


def _parquet(file: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MelinoeError(
            f"{file}: parquet needs the package datasets", next_step="pip install 'melinoe-moe[data]'"
        ) from None
    position = 0
    try:
        for batch in ParquetFile(file).iter_batches(1024):
            for record in batch.to_pylist():
                position += 1
                yield f"{file}, row {position}", without_nothing(record)
    except (ArrowException, OSError) as error:
        raise MelinoeError(f"{file} is damaged after row {position}", got=str(error)) from None


def without_nothing(value: Any) -> Any:
    """Without the None that a table puts wherever one of its rows has something and another has not."""
    if isinstance(value, dict):
        return {name: without_nothing(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nothing(inner) for inner in value]
    return value
