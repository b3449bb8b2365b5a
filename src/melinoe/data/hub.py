"""Data sets of the Hugging Face Hub, through the optional `datasets` library.

A data set is named `owner/name` or `owner/name:config`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from melinoe.errors import MelinoeError

# what the Hub calls our splits
SPLIT_NAMES = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}


def is_id(text: str) -> bool:
    """Whether a path that does not exist can be the id of a data set; file names are not."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", text)) and not text.endswith(
        (".jsonl", ".json")
    )


def read(source: str, split: str, limit: int | None = None) -> Iterable[dict[str, Any]]:
    """The records of one split, at most `limit` of them.

    Args:
        source: `owner/name`, with `:config` where the data set has several (`openai/gsm8k:main`).
        split: train, valid or test; `valid` is found under the name "validation" too.

    Raises:
        MelinoeError: `datasets` is not installed, or there is no such data set, config or split.
    """
    try:
        import datasets
    except ImportError:
        raise MelinoeError(
            f"{source} is no file or folder here, and without the package datasets it cannot be sought on the"
            " Hub",
            next_step="check the path, or: pip install 'melinoe-moe[data]'",
        ) from None
    name, _, config = source.partition(":")
    try:
        found = datasets.get_dataset_split_names(name, config or None)
        chosen = next((known for known in SPLIT_NAMES.get(split, (split,)) if known in found), None)
        if chosen is not None:
            data = datasets.load_dataset(name, config or None, split=chosen)
            return data.select(range(min(limit, len(data)))) if limit is not None else data
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise MelinoeError(
            f"cannot read the data set {source} of the Hub",
            got=f"{type(error).__name__}: {text}",
            next_step="check the name, the network, and HF_TOKEN where it is gated",
        ) from None
    raise MelinoeError(f"{source} has no split {split}", got=", ".join(found))
