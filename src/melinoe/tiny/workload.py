"""The embedded workload: 24 kinds of text task with exact answers, made here and endless.

A row is {"task", "prompt", "completion"}; the completion writes out its steps (those of `STEPWISE`;
mental arithmetic has none) and ends in a line `answer: X`. A prompt belongs to exactly one split, decided by
a hash of the prompt, so that no split ever sees another's prompts, whatever the seed. Standard library only:
the generator runs inside training and in tests. Operand ranges are stated in each task's docstring.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

from melinoe.tiny import tasks_mental, tasks_numbers, tasks_text

SPLITS = ("train", "valid", "test")
Task = Callable[[Random], tuple[str, str]]
STEPWISE: dict[str, Task] = {**tasks_numbers.TASKS, **tasks_text.TASKS}
TASKS: dict[str, Task] = {**STEPWISE, **tasks_mental.TASKS}


def split_of(prompt: str) -> str:
    """The one split a prompt belongs to: 80 percent train, 10 valid, 10 test."""
    bucket = hashlib.blake2b(prompt.encode(), digest_size=2).digest()
    share = int.from_bytes(bucket, "big") / 65536
    return "train" if share < 0.8 else "valid" if share < 0.9 else "test"


def stream(split: str, seed: int = 0, tasks: Sequence[str] | None = None) -> Iterator[dict[str, str]]:
    """Endless rows of a split without repeated prompts, tasks in turn.

    `tasks` names the tasks to cycle through; a name given twice comes twice as often. The rows
    depend on (split, seed, tasks) alone.

    Raises:
        ValueError: the split or a task is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    names = list(tasks or TASKS)
    if unknown := sorted(set(names) - set(TASKS)):
        raise ValueError(f"unknown tasks {unknown}; allowed: {', '.join(TASKS)}")
    random = Random(f"{split}/{seed}")
    seen: set[str] = set()
    while True:
        for name in names:
            prompt, completion = TASKS[name](random)
            while prompt in seen or split_of(prompt) != split:
                prompt, completion = TASKS[name](random)
            seen.add(prompt)
            yield {"task": name, "prompt": prompt, "completion": completion}


def rows(split: str, count: int, seed: int = 0, tasks: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The first `count` rows of `stream`; a longer call starts with the same rows."""
    source = stream(split, seed, tasks)
    return [next(source) for _ in range(count)]


def answer(completion: str) -> str:
    """What follows the last `answer: `, or an empty string where there is none."""
    _, found, text = completion.rpartition("answer: ")
    return text.strip() if found else ""


def write_splits(folder: str | Path, train: int, valid: int, test: int, seed: int = 0) -> None:
    """Write train.jsonl, valid.jsonl and test.jsonl with so many rows each."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in zip(SPLITS, (train, valid, test), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows(split, size, seed))
        (folder / f"{split}.jsonl").write_text(text)
