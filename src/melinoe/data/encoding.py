"""Rows to tokens, and which of the tokens are answers.

With a chat template the tokens of a row are those that `apply_chat_template` makes of the whole conversation;
nothing is encoded apart and put together. The answers are found in them: by the assistant mask where the
template marks what is generated, else as what follows the tokens of the prompt. An answer ends with the token
that ends a generation, which is not always the tokenizer's eos: what a template writes behind it is never
generated. Without a template prompt and answer are one text, encoded whole and split by offsets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from melinoe.data.characters import refuse_half_characters
from melinoe.data.chat import Chat, has_template, render, unwritten_role
from melinoe.data.columns import Message, Row, says_nothing
from melinoe.data.spans import Encoded, common_prefix, encoded_or_nothing
from melinoe.errors import MelinoeError


@dataclass(frozen=True)
class EncodedRows:
    """The rows that can be used, with their tokens, and how many cannot.

    too_long: rows of more than max_length tokens. empty: rows in which no answer says anything.
    """

    rows: list[Row]
    encoded: list[Encoded]
    too_long: int
    empty: int
    max_length: int | None

    @property
    def left_out(self) -> int:
        return self.too_long + self.empty

    def to_json(self) -> dict[str, Any]:
        """What every report says of the rows that it is not about."""
        return {
            "num_rows_left_out": self.left_out,
            "left_out": {"too_long": self.too_long, "empty": self.empty},
            "max_length": self.max_length,
        }

    def __str__(self) -> str:
        """`6 of 8 rows left out: 5 over 512 tokens, 1 with an empty answer`; nothing where none is."""
        reasons = [f"{self.too_long:,} over {self.max_length} tokens"] if self.too_long else []
        reasons += [f"{self.empty:,} with an empty answer"] if self.empty else []
        whole = len(self.rows) + self.left_out
        return f"{self.left_out:,} of {whole:,} rows left out: {', '.join(reasons)}" if reasons else ""


def encode_rows(
    tokenizer: Any,
    rows: Iterable[Row],
    max_length: int | None = None,
    *,
    end_tokens: Collection[int] = (),
    last_turn_only: bool = False,
) -> EncodedRows:
    """The rows as tokens. None is ever cut: half an answer would teach and measure something else.

    Args:
        max_length: longer rows are left out, and counted; None: none is too long.
        end_tokens, last_turn_only: as for `encode`.

    Raises:
        MelinoeError: a row that cannot be rendered (named with its file and line), or none is left.
    """
    kept: list[tuple[Row, Encoded]] = []
    too_long = empty = 0
    for row in rows:
        encoded = encode(tokenizer, row, end_tokens=end_tokens, last_turn_only=last_turn_only)
        if encoded is None:
            empty += 1
        elif max_length is not None and len(encoded.ids) > max_length:
            too_long += 1
        else:
            kept.append((row, encoded))
    result = EncodedRows([row for row, _ in kept], [one for _, one in kept], too_long, empty, max_length)
    if not kept:
        raise MelinoeError(
            f"no row can be used: {result}" if result.left_out else "no rows",
            next_step="raise --max-length" if too_long else None,
        )
    return result


def encode(
    tokenizer: Any, row: Row, *, end_tokens: Collection[int] = (), last_turn_only: bool = False
) -> Encoded | None:
    """Token ids of a row with the answers in them; None where no answer says anything.

    Args:
        end_tokens: what ends a generation besides the tokenizer's eos (runtime.generation_settings).
        last_turn_only: of a conversation of several turns only the last answer counts; else each of them.

    Raises:
        MelinoeError: the conversation cannot be rendered, or holds half of a surrogate pair.
    """
    refuse_half_characters(row.completion if row.is_text else row.conversation, row.name)
    if row.is_text:
        return _encode_text(tokenizer, row) if row.completion.strip() else None
    conversation = row.conversation
    turns = [
        turn
        for turn, message in enumerate(conversation)
        if message["role"] == "assistant" and turn not in row.given and not says_nothing(message)
    ]
    if last_turn_only:
        turns = turns[-1:] if turns and turns[-1] == len(conversation) - 1 else []
    if not turns:
        return None
    if has_template(tokenizer):
        ends = {*end_tokens, tokenizer.eos_token_id} - {None}
        return Chat(tokenizer, row, ends).encoded(turns)
    return _encode_joined(tokenizer, row, turns)


def encode_prompt(tokenizer: Any, prompt: Sequence[Message] | str | Row, raw: bool = False) -> list[int]:
    """Token ids of a prompt, ready for the answer: through the chat template if there is one and not `raw`.

    Args:
        prompt: a text of the user's, messages, or a row, whose last answer is asked for.

    Raises:
        MelinoeError: the template refuses the conversation, there is no template for what it holds, or it is
            no UTF-8.
    """
    row = prompt if isinstance(prompt, Row) else None
    if isinstance(prompt, str):
        prompt = ({"role": "user", "content": prompt},)
    messages = list(row.messages if row is not None else prompt)  # type: ignore[arg-type]
    refuse_half_characters(messages, row.name if row is not None else "the prompt")
    if raw or not has_template(tokenizer):
        prefix, ids, _ = _plain_ids(tokenizer, "".join(_contents(messages, row)))
        return prefix + ids
    whole: list[int] = render(tokenizer, messages, row, add_generation_prompt=True)
    role = unwritten_role(
        messages,
        tokenizer.decode(whole),
        lambda changed: render(tokenizer, changed, row, add_generation_prompt=True) == whole,
    )
    if role is not None:
        raise MelinoeError(
            f"the model's chat template does not write {role} messages, so they would be lost",
            next_step="say it in the user's message",
        )
    return whole


# ------------------------------------------------------------ without a template


def _plain_ids(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
    """(what the tokenizer puts before a text, the tokens of the text, what it puts behind)."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text)["input_ids"])
    for start in range(len(whole) - len(ids) + 1):
        if whole[start : start + len(ids)] == ids:
            return whole[:start], ids, whole[start + len(ids) :]
    return [], ids, []  # a tokenizer that encodes otherwise with special tokens around


def _end(tokenizer: Any, suffix: list[int]) -> list[int]:
    """What ends an answer: what the tokenizer puts behind a text itself, else its end token."""
    return suffix or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def _encode_text(tokenizer: Any, row: Row) -> Encoded | None:
    """Plain text: every token behind the first is learned, the first word too where a token stands before
    it."""
    prefix, ids, suffix = _plain_ids(tokenizer, row.completion)
    whole = [*prefix, *ids, *_end(tokenizer, suffix)]
    start = max(1, len(prefix))
    return Encoded(whole, ((start, len(whole)),)) if len(whole) > start else None


def _contents(messages: Iterable[Message], row: Row | None) -> list[str]:
    """The texts of messages that need no template."""
    where = row.name if row is not None else "the prompt"
    found = []
    for message in messages:
        if message["role"] == "tool" or set(message) & {"tool_calls"}:
            raise MelinoeError(
                f"{where}: tools need a chat template, and this tokenizer has none",
                next_step="use a model whose tokenizer has one, or leave out the rows with tools",
            )
        found.append(message.get("content", ""))
    if row is not None and row.tools:
        raise MelinoeError(
            f"{where}: tools need a chat template, and this tokenizer has none",
            next_step="use a model whose tokenizer has one, or leave out the rows with tools",
        )
    return found


def _encode_joined(tokenizer: Any, row: Row, turns: list[int]) -> Encoded | None:
    """The messages one behind the other as one text; each answer begins where its first character's token
    does."""
    texts = _contents(row.conversation, row)
    text = "".join(texts)
    prefix, ids, suffix = _plain_ids(tokenizer, text)
    places = _token_places(tokenizer, text, ids)
    spans = []
    for turn in turns:
        start, end = (places(sum(map(len, texts[:last]))) for last in (turn, turn + 1))
        spans.append((start + len(prefix), end + len(prefix)))
    whole = [*prefix, *ids, *_end(tokenizer, suffix)]
    if turns[-1] == len(texts) - 1:
        spans[-1] = (spans[-1][0], len(whole))
    return encoded_or_nothing(whole, spans)


def _token_places(tokenizer: Any, text: str, ids: list[int]) -> Any:
    """character -> the first token that reaches beyond it: by offsets, or where there are none (tokenizers in
    Python) as far as the tokens of the text before it are those of the whole."""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ends = [end for _, end in found]

        def by_offset(character: int) -> int:
            return next((i for i, end in enumerate(ends) if end > character), len(ends))

        return by_offset

    def by_prefix(character: int) -> int:
        before = tokenizer(text[:character], add_special_tokens=False)["input_ids"] if character else []
        return len(ids) if character == len(text) else common_prefix(before, ids)

    return by_prefix
