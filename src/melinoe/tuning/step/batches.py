"""Rows to batches: a budget of tokens, rows of like length together, the order set by the seed.

A step is a list of rows. It is computed in parts of at most `batch_tokens` padded tokens: one after the other
where gradients are accumulated, side by side where several processes run. Part p of n is `rows[p::n]`, so
that all parts are about as long. What a step's losses are divided by is counted over the whole step, here, so
that a part needs to know nothing of the others.

Rows are padded, not packed into one another: with rows of like length together a few percent of a batch are
padding (`padding_share`), and no attention mask, position or state-space layer has to be told where a
document ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from melinoe.data.batching import batch_of, length_batches
from melinoe.data.encoding import Encoded
from melinoe.tuning.parallel.processes import Processes
from melinoe.tuning.settings import TuneSettings

POOL_BATCHES = 8  # rows are sorted by length inside pools of about this many steps


def plan_batches(
    lengths: list[int],
    batch_tokens: int,
    num_steps: int,
    seed: int,
    parts: int = 1,
    fixed_length: int | None = None,
) -> list[list[int]]:
    """`num_steps` lists of row numbers.

    Each part of one, padded to its longest row, has at most `batch_tokens` tokens.

    Every row comes once per pass over the data, and passes follow each other without a seam. Mixed pools keep
    short and long rows in every stretch of the run.

    Args:
        lengths: tokens of each row, none above batch_tokens.
        parts: into which a step is divided (`part_of`); a step has at least as many rows.
        fixed_length: as `models.positions.fixed_length`: a longer row would change a shorter one.
    """
    assert max(lengths) <= batch_tokens, (max(lengths), batch_tokens)
    random = np.random.default_rng(seed)
    least = parts if fixed_length is None else 2 * parts  # of long ones and of short ones, one step's rows
    pool_rows = max(least, int(POOL_BATCHES * parts * batch_tokens / (sum(lengths) / len(lengths))))
    waiting: list[int] = []
    steps: list[list[int]] = []
    while len(steps) < num_steps:
        while len(waiting) < pool_rows:
            waiting += random.permutation(len(lengths)).tolist()
        pool, waiting = waiting[:pool_rows], waiting[pool_rows:]
        cut = length_batches(
            lengths, batch_tokens, positions=reversed(pool), parts=parts, fixed_length=fixed_length
        )
        # a part must not be empty; there are more rows in the pool than these
        waiting = [row for rows in cut if len(rows) < parts for row in rows] + waiting
        cut = [rows for rows in cut if len(rows) >= parts]
        steps += [cut[i] for i in random.permutation(len(cut))]
    return steps[:num_steps]


def part_of(rows: list[int], part: int, parts: int) -> list[int]:
    """The rows of one part of a step, longest first."""
    return rows[part::parts]


def padding_share(lengths: list[int], plan: list[list[int]], parts: int = 1) -> float:
    """Share of the computed positions that are padding, 0 .. 1."""
    real = sum(lengths[row] for rows in plan for row in rows)
    cut = [part_of(rows, part, parts) for rows in plan for part in range(parts)]
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in cut)
    return 1 - real / padded


@dataclass(frozen=True)
class TokensPerStep:
    """A mean step's completion tokens, those of them that decoding would process (scored_positions), and the
    rows that have some of these."""

    completion: float
    scored: float
    scored_rows: float


@dataclass(frozen=True)
class StepCounts:
    """What a whole step holds, all parts together.

    tokens: real ones, not padding. ranked: the tokens whose ranks are matched.
    """

    tokens: int
    rows: int
    completion: int
    ranked: int


class StepBatches(torch.utils.data.Dataset):
    """Dataset of the batches that one process computes, in order, `accumulate` of them per step.

    An item is padded right: {input_ids, attention_mask, answers (batch_of), ranked [B, S] bool (the tokens
    whose ranks are matched), counts (StepCounts)}.

    Args:
        plan: of plan_batches, for accumulate * processes parts.
        rank_tokens: tokens of a step on which ranks are matched, drawn by `seed` and step (0: all).
        process, processes: which part of each step is ours.
    """

    def __init__(
        self,
        encoded: list[Encoded],
        plan: list[list[int]],
        pad_token_id: int,
        *,
        rank_tokens: int = 0,
        seed: int = 0,
        accumulate: int = 1,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.encoded, self.plan, self.pad_token_id = encoded, plan, pad_token_id
        self.rank_tokens, self.seed = rank_tokens, seed
        self.accumulate, self.process, self.processes = accumulate, process, processes

    @classmethod
    def of(
        cls,
        encoded: list[Encoded],
        plan: list[list[int]],
        pad_token_id: int,
        settings: TuneSettings,
        processes: Processes,
        accumulate: int | None = None,
    ) -> StepBatches:
        """Those of one process of a run. accumulate: parts of a step, where fewer than was asked for."""
        return cls(
            encoded,
            plan,
            pad_token_id,
            rank_tokens=settings.rank_tokens,
            seed=settings.seed,
            accumulate=accumulate or settings.accumulate,
            process=processes.index,
            processes=processes.count,
        )

    def __len__(self) -> int:
        return len(self.plan) * self.accumulate

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, turn = divmod(index, self.accumulate)
        part, parts = turn * self.processes + self.process, self.accumulate * self.processes
        numbers = self.plan[step]
        ranked, counts = self._step(step)
        rows = [self.encoded[row] for row in part_of(numbers, part, parts)]
        chosen = ranked[part::parts]
        batch = batch_of(rows, self.pad_token_id)
        ranked_BS = torch.zeros_like(batch["answers"])
        for number, chosen_S in enumerate(chosen):
            ranked_BS[number, : len(chosen_S)] = chosen_S
        return {**batch, "ranked": ranked_BS, "counts": counts}

    def _step(self, step: int) -> tuple[list[torch.Tensor], StepCounts]:
        """([bool per token] per row of the step: whether its ranks are matched; what the step holds)."""
        rows = [self.encoded[row] for row in self.plan[step]]
        sizes = [len(row.ids) for row in rows]
        tokens = sum(sizes)
        if 0 < self.rank_tokens < tokens:
            generator = torch.Generator().manual_seed((self.seed << 20) + step)
            ranked = torch.zeros(tokens, dtype=torch.bool)
            ranked[torch.randperm(tokens, generator=generator)[: self.rank_tokens]] = True
        else:
            ranked = torch.ones(tokens, dtype=torch.bool)
        completion = sum(row.num_answer_tokens for row in rows)
        return list(ranked.split(sizes)), StepCounts(tokens, len(rows), completion, int(ranked.sum()))
