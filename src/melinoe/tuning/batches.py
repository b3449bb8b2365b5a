"""Rows to batches: a budget of tokens per step, rows of like length together, the order set by the seed."""

from __future__ import annotations

import numpy as np
import torch

from melinoe.data import Encoded

POOL_BATCHES = 8  # rows are sorted by length inside pools of about this many batches


def plan_batches(lengths: list[int], batch_tokens: int, num_batches: int, seed: int) -> list[list[int]]:
    """`num_batches` lists of row numbers; each, padded to its longest row, has at most `batch_tokens` tokens.

    Every row comes once per pass over the data, and passes follow each other without a seam. Mixed pools keep
    short and long rows in every stretch of the run.

    Args:
        lengths: tokens of each row, none above batch_tokens.
    """
    assert max(lengths) <= batch_tokens, (max(lengths), batch_tokens)
    random = np.random.default_rng(seed)
    pool_rows = max(1, int(POOL_BATCHES * batch_tokens / (sum(lengths) / len(lengths))))
    waiting: list[int] = []
    batches: list[list[int]] = []
    while len(batches) < num_batches:
        while len(waiting) < pool_rows:
            waiting += random.permutation(len(lengths)).tolist()
        pool, waiting = waiting[:pool_rows], waiting[pool_rows:]
        cut = _cut(sorted(pool, key=lambda row: lengths[row]), lengths, batch_tokens)
        batches += [cut[i] for i in random.permutation(len(cut))]
    return batches[:num_batches]


def _cut(rows: list[int], lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Rows in order of length, from the longest, into as few full batches as fit."""
    batches: list[list[int]] = []
    rows = rows[::-1]
    while rows:
        count = max(1, batch_tokens // lengths[rows[0]])
        batches.append(rows[:count])
        rows = rows[count:]
    return batches


class Batches(torch.utils.data.Dataset):
    """Dataset of whole batches, padded right: {input_ids, attention_mask [B, S], prompt_lengths [B]}."""

    def __init__(self, encoded: list[Encoded], plan: list[list[int]], pad_token_id: int) -> None:
        self.encoded, self.plan, self.pad_token_id = encoded, plan, pad_token_id

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rows = [self.encoded[row] for row in self.plan[index]]
        size = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), size), self.pad_token_id)
        mask = torch.zeros(len(rows), size, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            mask[number, : len(row.ids)] = 1
        lengths = torch.tensor([row.prompt_length for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "prompt_lengths": lengths}
