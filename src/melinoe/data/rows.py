"""Text rows: what tune, trace, evaluate and demo read.

A data set is a .jsonl file, a folder with train.jsonl, valid.jsonl and test.jsonl, the id of one on the
Hugging Face Hub (hub.py), or `tiny`, the embedded workload. Each line holds `messages`, or `prompt` and
`completion` (under this or another known pair of names), or `text`; the kind is detected line by line.
Encoding uses the tokenizer's chat template where it has one, so that a model is tuned on what it will be
asked.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melinoe.data import hub as hub_data
from melinoe.errors import MelinoeError

SPLITS = ("train", "valid", "test")
# names under which well-known data sets hold prompt and completion, and what is put below the prompt if it is
# there
PAIRS = (
    ("prompt", "completion", ()),
    ("question", "answer", ()),  # GSM8K
    ("instruction", "response", ("context",)),  # Dolly-15k
    ("instruction", "output", ("input",)),  # Alpaca
)


@dataclass(frozen=True)
class Row:
    """One example.

    `messages` is the conversation before the completion, `kind` the columns that it was read from.
    """

    messages: tuple[dict[str, str], ...]
    completion: str
    task: str = ""
    kind: str = ""

    @property
    def prompt(self) -> str:
        """The prompt as plain text (the last message before the completion)."""
        return self.messages[-1]["content"] if self.messages else ""


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt and completion; positions `prompt_length - 1 ..` predict the completion."""

    ids: list[int]
    prompt_length: int


def _parse_row(record: Any, where: str) -> Row:
    if not isinstance(record, dict):
        raise MelinoeError(f"{where}: not a JSON object", got=type(record).__name__)
    task = str(record.get("task", ""))
    if isinstance(record.get("messages"), list) and record["messages"]:
        messages = record["messages"]
        if not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages
        ):
            raise MelinoeError(f"{where}: a message lacks role or content")
        if messages[-1]["role"] != "assistant":
            raise MelinoeError(
                f"{where}: the last message is not the assistant's",
                got=messages[-1]["role"],
                allowed="assistant",
            )
        return Row(tuple(messages[:-1]), messages[-1]["content"], task, "messages")
    for first, second, below in PAIRS:
        if isinstance(record.get(first), str) and isinstance(record.get(second), str):
            parts = [record[first], *(record[name] for name in below if record.get(name))]
            prompt = {"role": "user", "content": "\n\n".join(map(str, parts))}
            return Row((prompt,), record[second], task, f"{first} + {second}")
    if isinstance(record.get("text"), str):
        return Row((), record["text"], task, "text")
    raise MelinoeError(
        f"{where}: unknown row format",
        got="keys " + ", ".join(sorted(map(str, record))),
        allowed="messages | " + " | ".join(f"{a} + {b}" for a, b, _ in PAIRS) + " | text (strings)",
    )


def resolve_data(source: str | Path) -> str | Path:
    """The folder of the embedded workload for `tiny`, which is made on first use; anything else as it is."""
    if str(source) != "tiny":
        return source
    from melinoe.tiny import data_path

    return data_path()


def read_rows(path: str | Path, split: str = "train", limit: int | None = None) -> list[Row]:
    """Rows of a file, or of one split of a folder or of a data set on the Hub.

    Args:
        path: a .jsonl file (then `split` is not looked at), a folder of train/valid/test.jsonl, a Hub id, or
            `tiny`.
        split: which part of a folder or data set.
        limit: at most this many rows, from the start.

    Raises:
        MelinoeError: no such file, a malformed line (named with file and line), or no rows.
    """
    path = resolve_data(path)
    if not Path(path).exists() and hub_data.is_id(str(path)):
        records = hub_data.read(str(path), split, limit)
        rows = [_parse_row(record, f"{path}, row {number}") for number, record in enumerate(records, 1)]
        return _checked(rows, path)
    path = Path(path)
    if path.is_dir():
        file = path / f"{split}.jsonl"
        if not file.is_file():
            found = ", ".join(sorted(p.name for p in path.glob("*.jsonl"))) or "no .jsonl files"
            raise MelinoeError(
                f"no {split}.jsonl in data folder {path}", got=found, allowed="train, valid, test.jsonl"
            )
    elif path.is_file():
        file = path
    else:
        raise MelinoeError(
            "no such data file or folder",
            got=path,
            allowed="a .jsonl file, a folder of train/valid/test.jsonl, the Hub id of a data set, or tiny",
        )
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(rows) >= limit:
                break
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise MelinoeError(f"{file}, line {number}: not JSON", got=error.msg) from None
            rows.append(_parse_row(record, f"{file}, line {number}"))
    return _checked(rows, file)


def _checked(rows: list[Row], source: object) -> list[Row]:
    if not rows:
        raise MelinoeError(f"{source} has no rows", allowed="at least one JSON line")
    return rows


def describe_rows(rows: list[Row]) -> str:
    """`400 rows of prompt + completion, 12 of text`: how many rows of which columns were detected."""
    counts = Counter(row.kind for row in rows)
    parts = [
        f"{count:,} rows of {kind}" if kind else f"{count:,} rows" for kind, count in counts.most_common()
    ]
    return ", ".join(parts)


def encode_prompt(tokenizer: Any, messages: tuple[dict[str, str], ...] | str, raw: bool = False) -> list[int]:
    """Token ids of a prompt: through the chat template if there is one and `raw` is false."""
    if isinstance(messages, str):
        messages = ({"role": "user", "content": messages},)
    if raw or not getattr(tokenizer, "chat_template", None):
        return tokenizer("".join(m["content"] for m in messages), add_special_tokens=True)["input_ids"]
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tokenizer: Any, row: Row, max_length: int | None = None) -> Encoded | None:
    """Token ids of a row, the end token last; None when it is longer than `max_length` or has no completion.

    A row is never cut: half an answer would teach and measure something else.
    """
    prompt = encode_prompt(tokenizer, row.messages) if row.messages else []
    completion = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    ids = prompt + completion
    if not prompt:  # plain text: the first token is the prompt
        prompt = ids[:1]
    if len(ids) <= len(prompt) or (max_length is not None and len(ids) > max_length):
        return None
    return Encoded(ids, len(prompt))


def encode_rows(tokenizer: Any, rows: list[Row], max_length: int | None = None) -> list[tuple[Row, Encoded]]:
    """The rows that fit, with their ids.

    Raises:
        MelinoeError: none fits.
    """
    pairs = [(row, encode(tokenizer, row, max_length)) for row in rows]
    kept = [(row, encoded) for row, encoded in pairs if encoded is not None]
    if not kept:
        raise MelinoeError(
            f"none of {len(rows)} rows fits",
            allowed=f"at most {max_length} tokens",
            next_step="raise --max-length",
        )
    return kept
