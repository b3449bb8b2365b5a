"""Conversations and chat templates: the tokens of a whole conversation, and the answers in them.

The tokens are those of `apply_chat_template`. An answer is what the template marks as generated, else what
stands behind the tokens of its prompt; it ends with the first token that would end a generation. A part of
the conversation that the template does not write is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from melinoe.data.columns import Message, Row
from melinoe.data.spans import Encoded, Span, common_prefix, encoded_or_nothing
from melinoe.errors import MelinoeError

_MARKS_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: list[Message], row: Row | None, **options: Any) -> Any:
    """What the template makes of messages: token ids, or the whole answer of the tokenizer with a mask."""
    if row is not None:
        options = {**dict(row.template_settings), **options}
        options["tools"] = list(row.tools) or None
    try:
        found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except Exception as error:  # the template is a program of the checkpoint's
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        where = f"{row.name}: " if row is not None else ""
        raise MelinoeError(f"{where}the chat template refuses this conversation", got=reason) from None
    return found if options.get("return_assistant_tokens_mask") else list(found["input_ids"])


def unwritten_role(
    messages: list[Message], written: str, is_same: Callable[[list[Message]], bool]
) -> str | None:
    """The role of a message that a template ignores, which would make another conversation without a word.

    Args:
        written: what the template makes of the messages.
        is_same: whether it makes the same of others.
    """
    for place, message in enumerate(messages):
        content = message.get("content")
        content = content.strip() if isinstance(content, str) else ""
        if message["role"] in ("assistant", "user") or not content or content in written:
            continue  # a template without these two would be none
        if is_same([*messages[:place], message | {"content": content + " x"}, *messages[place + 1 :]]):
            return str(message["role"])
    return None


class Chat:
    """One row and its template.

    Args:
        ends: the tokens that end a generation.
    """

    def __init__(self, tokenizer: Any, row: Row, ends: set[int]) -> None:
        self.tokenizer, self.row, self.ends = tokenizer, row, ends
        self.messages = row.conversation
        self.ids: list[int] = self._ids(self.messages)
        self._refuse_what_is_dropped()

    def encoded(self, turns: list[int]) -> Encoded | None:
        """Args: turns: the messages that are answers."""
        marked = self._marked()
        spans = [self._ended(marked[turn] if marked else self._found(turn)) for turn in turns]
        return encoded_or_nothing(self.ids, spans)

    def _ids(self, messages: list[Message], **options: Any) -> list[int]:
        return render(self.tokenizer, messages, self.row, **options)

    def _marked(self) -> dict[int, Span] | None:
        """What the template itself marks as generated, by message; None where it does not, or not one for
        each."""
        template = self.tokenizer.get_chat_template(tools=list(self.row.tools) or None)
        if not getattr(self.tokenizer, "is_fast", False) or not _MARKS_GENERATION.search(template):
            return None
        found = render(self.tokenizer, self.messages, self.row, return_assistant_tokens_mask=True)
        mask = [0, *found["assistant_masks"], 0]
        edges = [i for i in range(len(mask) - 1) if mask[i] != mask[i + 1]]
        said = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        return dict(zip(said, spans, strict=True)) if len(spans) == len(said) else None

    def _found(self, turn: int) -> Span:
        """An answer as what stands behind the tokens of its prompt."""
        before, last = self.messages[:turn], turn == len(self.messages) - 1
        try:
            prompt = self._ids(before, add_generation_prompt=True)
            start = common_prefix(prompt, self.ids)
            if start < len(prompt) and start < common_prefix(self._ids(before), prompt):
                return self._by_change(turn)  # the template writes what came before otherwise if more follows
            end = len(self.ids) if last else common_prefix(self._ids(self.messages[: turn + 1]), self.ids)
        except MelinoeError:  # no conversation by itself, though the whole is one
            return self._by_change(turn)
        return (start, end) if end > start else (start, self._by_change(turn)[1])

    def _by_change(self, turn: int) -> Span:
        """An answer as what changes in the tokens when it is another one, and what follows up to its end."""
        start, end = self._changed(turn)
        if turn == len(self.messages) - 1:
            return start, len(self.ids)
        limit = max(end, self._changed(turn + 1)[0])
        return start, next((i + 1 for i in range(end, limit) if self.ids[i] in self.ends), end)

    def _changed(self, place: int) -> Span:
        """The tokens that change when a message has another text."""
        message = self.messages[place]
        content = (message.get("content") or "").strip() or "z"
        other = "".join("y" if character == "x" else "x" for character in (content[0], content[-1]))
        changed = [*self.messages]
        changed[place] = {"role": message["role"], "content": other}
        ids = self._ids(changed)
        start = common_prefix(ids, self.ids)
        behind = common_prefix(ids[start:][::-1], self.ids[start:][::-1])
        return start, len(self.ids) - behind

    def _ended(self, span: Span) -> Span:
        """The span up to its first end token, which may stand right behind it."""
        start, end = span
        for place in range(start, end):
            if self.ids[place] in self.ends:
                return start, place + 1
        return start, end + (end < len(self.ids) and self.ids[end] in self.ends)

    def _refuse_what_is_dropped(self) -> None:
        """A template that ignores a part of the conversation would make another one of it, without a word."""
        for place, message in enumerate(self.messages):
            if message.get("tool_calls"):
                without = {name: value for name, value in message.items() if name != "tool_calls"}
                if self._is_same([*self.messages[:place], without, *self.messages[place + 1 :]]):
                    self._refuse("tool calls")
        role = unwritten_role(self.messages, self.tokenizer.decode(self.ids), self._is_same)
        if role is not None:
            self._refuse(f"{role} messages")
        bare = replace(self.row, tools=())
        if self.row.tools and render(self.tokenizer, self.messages, bare) == self.ids:
            self._refuse("tools")

    def _is_same(self, messages: list[Message]) -> bool:
        return self._ids(messages) == self.ids

    def _refuse(self, what: str) -> None:
        raise MelinoeError(
            f"{self.row.name}: the chat template does not write {what}, so they would be lost",
            next_step="take them out of the rows, or use a model whose template has them",
        )
