"""Token sequences side by side: cut into batches of like length, padded to rectangles.

One rule for tuning, traces and quality. What a batch costs is its rectangle, so sequences of like length go
together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from melinoe.data.encoding import Encoded


def length_batches(
    lengths: Sequence[int],
    tokens: int,
    batch_size: int | None = None,
    *,
    positions: Iterable[int] | None = None,
    parts: int = 1,
    fixed_length: int | None = None,
) -> list[list[int]]:
    """Positions in batches of like length, longest first (so that a lack of memory shows at once).

    It is not what plans the steps of a run (tuning.step.batches.plan_batches): that one mixes pools of rows
    by the seed, so that short and long rows stand in every stretch of the run, and only cuts a pool by this
    rule.

    Args:
        lengths: tokens of each sequence.
        tokens: that a batch, padded to its longest sequence, may hold; one sequence is always allowed.
        batch_size: sequences per batch, whatever they hold; None: as many as `tokens` allows.
        positions: which sequences, in the order of those that are equally long; None: all.
        parts: that a batch is computed in, each of which may hold `tokens`.
        fixed_length: as `models.positions.fixed_length`: a longer sequence would change a shorter one.
    """
    order = sorted(range(len(lengths)) if positions is None else positions, key=lambda one: -lengths[one])
    batches, start = [], 0
    while start < len(order):
        size = batch_size or parts * max(1, tokens // lengths[order[start]])
        batch = order[start : start + size]
        if fixed_length is not None and lengths[batch[0]] > fixed_length:
            batch = [one for one in batch if lengths[one] > fixed_length]
        batches.append(batch)
        start += len(batch)
    return batches


def pad(
    rows: Sequence[Sequence[int]],
    pad_token_id: int,
    side: Literal["left", "right"] = "right",
    device: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both [B, S] int64; mask is 1 for real tokens.

    Args:
        side: right where sequences are read whole; left where each is continued by generation.
    """
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad_token_id), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return ids.to(device), mask.to(device)


def batch_of(rows: Sequence[Encoded], pad_token_id: int, device: Any = None) -> dict[str, torch.Tensor]:
    """Rows as one batch, padded on the right: {input_ids, attention_mask [B, S] int64, answers [B, S] bool}.

    answers: the tokens of answers, as `Encoded` has them.
    """
    ids, mask = pad([row.ids for row in rows], pad_token_id)
    answers_BS = torch.zeros_like(mask, dtype=torch.bool)
    for number, row in enumerate(rows):
        for start, end in row.answers:
            answers_BS[number, start:end] = True
    batch = {"input_ids": ids, "attention_mask": mask, "answers": answers_BS}
    return {name: tensor.to(device) for name, tensor in batch.items()}
