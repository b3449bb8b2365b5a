"""What the optional `datasets` library reads: data sets of the Hugging Face Hub, `owner/name` or
`owner/name:config`, and folders that it saved."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from melinoe.data.files import ENDINGS, SPLIT_NAMES, Record, split_of, without_nothing
from melinoe.errors import MelinoeError

_SAVED = ("dataset_dict.json", "state.json")  # of a data set with splits, and of one without


def is_id(text: str) -> bool:
    """Whether a path that does not exist can be the id of a data set; file names are not."""
    ends = (*ENDINGS, ".gz")
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", text)) and not text.endswith(ends)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the datasets library wrote this folder."""
    return any((folder / name).is_file() for name in _SAVED)


def read(source: str, split: str, limit: int | None = None) -> Iterator[Record]:
    """The records of one split of a data set on the Hub, at most `limit` of them.

    Args:
        source: `owner/name`, with `:config` where the data set has several (`openai/gsm8k:main`).
        split: train, valid or test; `valid` is found under the name "validation" too.

    Raises:
        MelinoeError: `datasets` is not installed, or there is no such data set, config or split.
    """
    datasets = _library(f"{source} is no file or folder here, and to seek it on the Hub")
    name, _, config = source.partition(":")

    def opened() -> Any:
        found = datasets.get_dataset_split_names(name, config or None)
        return datasets.load_dataset(name, config or None, split=_chosen(source, split, found))

    next_step = "check the name, the network, and HF_TOKEN where it is gated"
    return _records(source, opened, f"cannot read the data set {source} of the Hub", next_step, limit)


def read_saved(folder: Path, split: str, limit: int | None = None) -> Iterator[Record]:
    """The records of one split of a folder that `save_to_disk` wrote; of all of it where it has no splits.

    Raises:
        MelinoeError: `datasets` is not installed, the folder is damaged, or it has no such split.
    """
    datasets = _library(f"{folder} was saved by the package datasets, and to read it")

    def opened() -> Any:
        data = datasets.load_from_disk(str(folder))
        return data[_chosen(folder, split, list(data))] if isinstance(data, datasets.DatasetDict) else data

    return _records(folder, opened, f"cannot read the saved data set {folder}", None, limit)


def _library(wish: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MelinoeError(
            f"{wish} takes the package datasets, which is not installed",
            next_step="check the path, or: pip install 'melinoe-moe[data]'",
        ) from None
    return datasets


def _chosen(source: object, split: str, found: list[str]) -> str:
    names = (split, *SPLIT_NAMES.get(split_of(split), ()))
    chosen = next((name for name in names if name in found), None)
    if chosen is None:
        raise MelinoeError(f"{source} has no split {split}", allowed=", ".join(found))
    return chosen


def _records(
    source: object, opened: Callable[[], Any], what: str, next_step: str | None, limit: int | None
) -> Iterator[Record]:
    try:
        data = opened()
        data = data.select(range(min(limit, len(data)))) if limit is not None else data
    except MelinoeError:
        raise
    except Exception as error:  # of the network, of the library, or of the data set's own files
        text = " ".join(str(error).split())[:200]
        raise MelinoeError(what, got=f"{type(error).__name__}: {text}", next_step=next_step) from None
    for number, record in enumerate(data, 1):
        yield f"{source}, row {number}", without_nothing(record)
