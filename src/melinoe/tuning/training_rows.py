"""The rows of a run: read, turned into tokens, planned into steps, and what is kept apart to measure on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melinoe.data.encoding import Encoded, EncodedRows, encode_rows
from melinoe.data.rows import Row, describe_rows, read_rows
from melinoe.errors import MelinoeError
from melinoe.models.folder import local_folder, resolve_model
from melinoe.models.positions import fixed_length
from melinoe.models.pretrained import read_config, read_tokenizer
from melinoe.runtime.generation_settings import end_tokens, folder_settings
from melinoe.tuning.memory.activations import BatchShape
from melinoe.tuning.memory.needed import batch_shape
from melinoe.tuning.settings import TuneSettings
from melinoe.tuning.step.batches import TokensPerStep, padding_share, plan_batches


@dataclass(frozen=True)
class TrainingRows:
    """What a run trains on.

    usable: the rows as tokens, and how many were left out. plan: row numbers of every step. parts: into which
    a step is divided.
    """

    tokenizer: Any
    usable: EncodedRows
    plan: list[list[int]]
    parts: int

    @property
    def encoded(self) -> list[Encoded]:
        return self.usable.encoded

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def largest_batch(self, settings: TuneSettings, accumulate: int | None = None) -> BatchShape:
        """accumulate: parts of a step that one process computes, where they are fewer than was asked for."""
        parts = self.parts if accumulate is None else self.parts // settings.accumulate * accumulate
        return batch_shape(self.encoded, self.plan, settings, parts)

    def tokens(self, steps: int) -> int:
        """Real tokens of the first so many steps."""
        return sum(len(self.encoded[row].ids) for rows in self.plan[:steps] for row in rows)

    def tokens_per_step(self) -> TokensPerStep:
        rows = [self.encoded[row] for numbers in self.plan for row in numbers]
        completion = sum(row.num_answer_tokens for row in rows)
        answers = sum(len(row.answers) for row in rows)  # the last token of each is not fed by decoding
        scored_rows = sum(row.num_answer_tokens > len(row.answers) for row in rows)
        steps = len(self.plan)
        return TokensPerStep(completion / steps, (completion - answers) / steps, scored_rows / steps)


def read_training_rows(
    model: str | Path,
    data: str | Path,
    settings: TuneSettings,
    processes: int = 1,
    show: bool = False,
    quiet: bool = False,
) -> TrainingRows:
    """Reads what a run trains on, with the model's own tokenizer.

    Args:
        show: say on stderr what was found.
        quiet: of that, only what was left out.

    Raises:
        MelinoeError: no such data, or no usable rows.
    """
    folder = local_folder(resolve_model(model))
    tokenizer = read_tokenizer(folder)
    rows = read_rows(data)
    usable = _encoded(folder, tokenizer, rows, settings)
    lengths = [len(row.ids) for row in usable.encoded]
    parts = settings.accumulate * processes
    fixed = fixed_length(read_config(folder))
    plan = plan_batches(lengths, settings.batch_tokens, settings.max_steps, settings.seed, parts, fixed)
    if show and (usable.left_out or not quiet):
        why = f"{usable}; " if usable.left_out else ""
        padding = f"{padding_share(lengths, plan, parts):.1%} of a batch is padding"
        print(f"melinoe: {data}: {describe_rows(rows)}; {why}{padding}", file=sys.stderr)
    return TrainingRows(tokenizer, usable, plan, parts)


def _encoded(folder: Path, tokenizer: Any, rows: list[Row], settings: TuneSettings) -> EncodedRows:
    return encode_rows(
        tokenizer,
        rows,
        settings.max_length,
        end_tokens=end_tokens(folder_settings(folder), tokenizer),
        last_turn_only=settings.last_turn_only,
    )


def read_held_out_rows(
    model: str | Path, tokenizer: Any, data: str | Path, eval_data: str | Path | None, settings: TuneSettings
) -> list[Encoded]:
    """The rows to measure on while tuning; none where that was not asked.

    Args:
        eval_data: None: the valid split of `data`.

    Raises:
        MelinoeError: no such rows.
    """
    if not settings.eval_steps:
        return []
    if eval_data is None and Path(data).is_file():
        raise MelinoeError(
            "tune: evaluation needs held-out rows, and a single file has none",
            got=data,
            next_step="give --eval-data, or --data a folder with valid.jsonl",
        )
    rows = read_rows(data if eval_data is None else eval_data, "valid")
    folder = local_folder(resolve_model(model))
    return _encoded(folder, tokenizer, rows, settings).encoded[: settings.eval_rows]
