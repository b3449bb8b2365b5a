"""Rows as tokens of the dense model's chat template, in batches of like length."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from melinoe.data.batching import batch_of, length_batches
from melinoe.data.encoding import Encoded, encode_rows
from melinoe.data.rows import read_rows

MAX_LENGTH = 400


def encoded(tokenizer: Any, folders: Sequence[Path], split: str, limit: int | None = None) -> list[Encoded]:
    """Rows of all folders, `limit` of each, in an order that does not change."""
    found: list[Encoded] = []
    for folder in folders:
        rows = encode_rows(tokenizer, read_rows(folder, split), MAX_LENGTH).encoded
        random.Random(0).shuffle(rows)
        found += rows[:limit]
    return found


def batches(rows: Sequence[Encoded], tokens: int, pad: int, epoch: int) -> Iterator[dict[str, Tensor]]:
    """Batches of at most `tokens` places each, {input_ids, attention_mask, answers}, in the epoch's order."""
    order = list(range(len(rows)))
    random.Random(epoch).shuffle(order)
    cut = length_batches([len(row.ids) for row in rows], tokens, positions=order)
    random.Random(epoch).shuffle(cut)
    for positions in cut:
        yield batch_of([rows[one] for one in positions], pad)
