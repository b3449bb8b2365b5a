"""Text that no tokenizer can read.

A byte of the command line or of stdin that is not UTF-8, and `"\\ud800"` in a JSON file, become half of a
surrogate pair in Python: a string that cannot be written as UTF-8, on which tokenizers fail by naming types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from melinoe.errors import MelinoeError


def refuse_half_characters(found: Any, where: str) -> None:
    """
    Args:
        found: a string, or messages and whatever else JSON can hold.
        where: names it in the error.

    Raises:
        MelinoeError: a string in it holds half of a surrogate pair.
    """
    for text in _strings(found):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            byte = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
            raise MelinoeError(
                f"{where} is not UTF-8",
                got=f"{byte} behind {text[max(0, error.start - 20) : error.start]!r}",
                next_step="write it as UTF-8",
            ) from None


def _strings(found: Any) -> Iterator[str]:
    if isinstance(found, str):
        yield found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from _strings(key)
            yield from _strings(value)
    elif isinstance(found, Sequence):
        for value in found:
            yield from _strings(value)
