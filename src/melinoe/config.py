"""Sizes, folders and numbers that several stages share; each default is written once, here."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from melinoe.errors import MelinoeError

RECORD_ALIGNMENT = 4096  # bytes; what O_DIRECT asks of file offsets, lengths and addresses
DEFAULT_SEED = 0
MAX_SEED = 2**32 - 1  # what numpy, and with it transformers, takes
STORE_METHOD = "melinoe"  # by which a store's config.json names our quantizer
DEFAULT_POLICY = "decay"  # of eviction (melinoe.routing.policies)
SMALLEST_BARE = 2**20  # a number of bytes without a unit; less is meant otherwise


def default_slots(num_experts: int, experts_per_token: int) -> int:
    """Records per layer where nobody says how many: a quarter of the experts, and room for one token's."""
    return max(experts_per_token, num_experts // 4)


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_bytes(text: str | int) -> int:
    """Bytes from `4GiB`, `500MB` or a plain number of bytes.

    Units are exact (KiB, MiB, GiB, TiB are powers of 1024; KB, MB, GB, TB of 1000). `8G` and `8Gb`
    are refused, because half of their users mean something else, and so is a bare `8`.

    Raises:
        MelinoeError: the text is not a size.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    number, unit = match.groups() if match else ("", "?")
    bare = not unit and float(number) < SMALLEST_BARE
    if unit not in _UNITS or bare:
        letter = "G" if bare else unit[0].upper()
        meant = f"did you mean {number}{letter}B or {number}{letter}iB?" if letter in "KMGT" else None
        allowed = None if meant else "a number with B, KiB, MiB, GiB, KB, MB or GB"
        raise MelinoeError("not a memory size", got=repr(text), allowed=allowed, next_step=meant)
    return int(float(number) * _UNITS[unit])


def parse_share(text: str | float) -> float:
    """0.01 from `1%` or `0.01`.

    Raises:
        MelinoeError: the text is neither.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", str(text))
    if not match:
        raise MelinoeError("not a share", got=repr(text), allowed="1% or 0.01")
    return float(match[1]) / (100 if match[2] else 1)


def format_bytes(count: float) -> str:
    """`1.5 GiB` from 1610612736; three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < (1024 if unit == "B" else 999.5):
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def format_rate(rate: float) -> str:
    """`24.1`, `3.84`, `0.0571`: three significant digits, one behind the point at least.

    Speeds of one table lie orders apart; with one digit behind the point the slow ones would all be 0.1.
    """
    size = abs(float(f"{rate:.3g}"))  # rounded first: 0.9996 is 1.00
    if not 0 < size < 10:  # infinity and no number at all, too
        return f"{rate:.1f}"
    return f"{rate:.{2 - math.floor(math.log10(size))}f}"


def home() -> Path:
    """Where melinoe keeps what it can make again: $MELINOE_HOME or ~/.cache/melinoe."""
    return Path(os.environ.get("MELINOE_HOME") or Path.home() / ".cache" / "melinoe")
