"""Training batches of the embedded model: fresh rows, packed into rows of one fixed length.

One shape for every step lets torch.compile work once, and packing wastes about five percent of the
tokens where padding would waste thirty. Packed examples do not see each other (a block-diagonal
mask) and every example starts at position 0, as it does when the model is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from melinoe.tiny.workload import rows

BLOCK_ROWS = 1200  # rows generated, packed and shuffled together


@dataclass(frozen=True)
class Batch:
    """ids, positions and labels are [B, S]; mask is [B, 1, S, S], True where attention is allowed."""

    ids: Tensor
    positions: Tensor
    labels: Tensor
    mask: Tensor


def encode(tokenizer: Any, examples: Sequence[dict[str, str]]) -> list[tuple[list[int], int]]:
    """(ids, prompt length with its separator) of each row, in the chat template's form."""
    prompts = tokenizer([row["prompt"] for row in examples], add_special_tokens=False)["input_ids"]
    completions = tokenizer([row["completion"] for row in examples], add_special_tokens=False)["input_ids"]
    separator, end = tokenizer.convert_tokens_to_ids("<sep>"), tokenizer.eos_token_id
    return [
        ([*prompt, separator, *completion, end], len(prompt) + 1)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Groups of indices whose lengths sum to at most `size`: best fit, longest first."""
    space: dict[int, list[list[int]]] = {}
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        room = min(
            (left for left, open_groups in space.items() if left >= length and open_groups), default=None
        )
        if room is None:
            group: list[int] = []
            groups.append(group)
            room = size
        else:
            group = space[room].pop()
        group.append(index)
        space.setdefault(room - length, []).append(group)
    return groups


def _collate(groups: list[list[tuple[list[int], int]]], size: int, prompt_loss: bool) -> Batch:
    shape = (len(groups), size)
    ids = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    owner = torch.full(shape, -1)
    for line, group in enumerate(groups):
        start = 0
        for number, (tokens, prompt_length) in enumerate(group):
            stop = start + len(tokens)
            ids[line, start:stop] = torch.tensor(tokens)
            positions[line, start:stop] = torch.arange(len(tokens))
            owner[line, start:stop] = number
            first = 1 if prompt_loss else prompt_length
            # the label stands where the token is predicted: one place before it
            labels[line, start + first - 1 : stop - 1] = ids[line, start + first : stop]
            start = stop
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    mask = (owner.unsqueeze(2) == owner.unsqueeze(1)) & causal
    return Batch(ids, positions, labels, mask.unsqueeze(1))


def batches(
    tokenizer: Any, seed: int, lines: int, size: int, block: int = 0, tasks: Sequence[str] | None = None
) -> Iterator[tuple[int, Batch]]:
    """Endless (block number, batch) from block `block` on; every block has rows of its own seed."""
    while True:
        examples = encode(tokenizer, rows("train", BLOCK_ROWS, seed * 1_000_000 + block, tasks))
        groups = [[examples[i] for i in group] for group in pack([len(ids) for ids, _ in examples], size)]
        Random(f"{seed}/{block}").shuffle(groups)
        for start in range(0, len(groups) - lines + 1, lines):
            yield block, _collate(groups[start : start + lines], size, prompt_loss=False)
        block += 1
