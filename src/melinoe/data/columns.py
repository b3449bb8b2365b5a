"""Records to rows: which columns hold the conversation, under the names that people use.

    messages                    OpenAI's and TRL's: role and content, tool calls, content in parts
    conversations               ShareGPT's: from and value
    prompt + completion         text, or TRL's lists of messages
    question + answer, ...      PAIRS
    text                        plain text, of which every word is learned

Beside them `system`, `history` (what was asked and answered before), `tools` and `chat_template_kwargs`
belong to the conversation; `task` is a label. Other columns are not used, and a report names them. What
cannot be
read is refused with file and line: a row that is silently read as something else would be learned as such.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from melinoe.errors import MelinoeError

Message = dict[str, Any]

# names under which well-known data sets hold prompt and completion, and what is put below the prompt if it is
# there
PAIRS = (
    ("prompt", "completion", ()),
    ("question", "answer", ()),  # GSM8K
    ("instruction", "response", ("context",)),  # Dolly-15k
    ("instruction", "output", ("input",)),  # Alpaca
    ("question", "response", ()),  # OpenOrca
    ("query", "response", ()),  # MetaMathQA
    ("problem", "solution", ()),  # NuminaMath
)
CONVERSATIONS = ("messages", "conversations")
SYSTEM = ("system", "system_prompt")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "function_call",
    "function_response": "tool",
}
_ROLES_OF_MESSAGES = {"developer": "system", "function": "tool"}  # other names of the same
REASONING = ("reasoning_content", "reasoning", "thinking")  # as transformers names it


@dataclass(frozen=True)
class Row:
    """One example.

    messages: the conversation before the completion; empty for plain text.
    completion: text of the last answer.
    task: a label. kind: the columns that the row was read from.
    answer: the last message where it holds more than text, such as tool calls.
    given: positions of assistant messages that are not to be learned or scored.
    tools, template_settings: what the chat template is told besides.
    where: file and line. unused: columns that were not looked at.
    """

    messages: tuple[Message, ...]
    completion: str
    task: str = ""
    kind: str = ""
    answer: Message | None = None
    given: tuple[int, ...] = ()
    tools: tuple[Any, ...] = ()
    template_settings: tuple[tuple[str, Any], ...] = ()
    where: str = ""
    unused: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The prompt as plain text (the last message before the completion)."""
        return self.messages[-1].get("content", "") if self.messages else ""

    @property
    def is_text(self) -> bool:
        """Whether this is plain text and no conversation."""
        return not self.messages and self.answer is None and self.kind in ("", "text")

    @property
    def conversation(self) -> list[Message]:
        """All messages, the answer last."""
        return [*self.messages, self.answer or {"role": "assistant", "content": self.completion}]

    @property
    def name(self) -> str:
        """How an error names the row."""
        return self.where or f"the row {self.prompt or self.completion!r:.40}"


def says_nothing(message: Message) -> bool:
    """Whether an answer is empty: there is nothing to learn from it but to stop."""
    said = (message.get("content"), message.get("tool_calls"), *(message.get(name) for name in REASONING))
    return not any(part.strip() if isinstance(part, str) else part for part in said)


def parse_row(record: Any, where: str) -> Row:
    """The row of a record.

    Args:
        where: file and line, for errors.

    Raises:
        MelinoeError: columns of no known format, or a conversation that is none.
    """
    if not isinstance(record, dict):
        raise MelinoeError(f"{where}: not a JSON object", got=type(record).__name__)
    columns = _Columns(record, where)
    task = str(columns.take("task") or "")
    kind, messages, given = _conversation(columns)
    if kind == "text":
        return Row((), columns.text("text"), task, kind, where=where, unused=columns.unused())
    messages, before = _with_history(columns, messages)
    given = [position + before for position in given]
    tools, settings = columns.json("tools", list), columns.json("chat_template_kwargs", dict)
    last = messages[-1]
    if last["role"] != "assistant":
        raise MelinoeError(
            f"{where}: the last message is not the assistant's", got=last["role"], allowed="assistant"
        )
    given += [i for i, message in enumerate(messages) if message.pop("weight", 1) == 0]
    plain = set(last) == {"role", "content"}
    return Row(
        tuple(messages[:-1]),
        last.get("content", ""),
        task,
        kind,
        answer=None if plain else last,
        given=tuple(sorted(set(given))),
        tools=tuple(tools or ()),
        template_settings=tuple((settings or {}).items()),
        where=where,
        unused=columns.unused(),
    )


class _Columns:
    """A record, and which of its columns were looked at."""

    def __init__(self, record: dict[str, Any], where: str) -> None:
        self.record, self.where, self.used = record, where, set[str]()

    def has(self, *names: str) -> bool:
        return all(self.record.get(name) is not None for name in names)

    def take(self, name: str) -> Any:
        self.used.add(name)
        return self.record.get(name)

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str):
            raise MelinoeError(
                f"{self.where}: {name} is not text", got=_kind(value), allowed="a string in quotes"
            )
        return value

    def json(self, name: str, kind: type) -> Any:
        """A list or an object, which a table may hold as JSON; None where there is nothing."""
        value = self.take(name)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except ValueError as error:
                raise MelinoeError(f"{self.where}: {name} is text, and no JSON", got=str(error)) from None
        if value in (None, "", [], {}) or (isinstance(value, str) and not value.strip()):
            return None
        if not isinstance(value, kind):
            allowed = "a list" if kind is list else "an object"
            raise MelinoeError(f"{self.where}: {name} has an unknown form", got=_kind(value), allowed=allowed)
        return value

    def unused(self) -> tuple[str, ...]:
        """Columns with something in them that nobody looked at."""
        return tuple(
            str(name)
            for name, value in self.record.items()
            if name not in self.used and value not in (None, "", [], {})
        )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), f"the number {value}" if isinstance(value, int | float) else repr(value))


def _conversation(columns: _Columns) -> tuple[str, list[Message], list[int]]:
    """(the columns, the messages, positions of those that are given); no messages for plain text."""
    where = columns.where
    for name in CONVERSATIONS:
        if columns.has(name) and (found := columns.json(name, list)):
            return name, [_message(message, where) for message in found], []
    for first, second, below in PAIRS:
        if not columns.has(first, second):
            continue
        kind = f"{first} + {second}"
        if first == "prompt" and any(isinstance(columns.record[name], list) for name in (first, second)):
            prompt, completion = (_side(columns, name) for name in (first, second))
            messages = [*(prompt or []), *(completion or [{"role": "assistant", "content": ""}])]
            return kind, messages, [i for i in range(len(prompt or [])) if messages[i]["role"] == "assistant"]
        parts = [columns.text(first), *(columns.text(name) for name in below if columns.record.get(name))]
        user = {"role": "user", "content": "\n\n".join(parts)}
        return kind, [user, {"role": "assistant", "content": columns.text(second)}], []
    if columns.has("text"):
        return "text", [], []
    raise MelinoeError(
        f"{where}: unknown row format",
        got="keys " + ", ".join(sorted(map(str, columns.record))),
        allowed=" | ".join([*CONVERSATIONS, *(f"{first} + {second}" for first, second, _ in PAIRS), "text"]),
    )


def _side(columns: _Columns, name: str) -> list[Message]:
    """The messages of `prompt` or `completion`."""
    value = columns.take(name)
    if isinstance(value, str):
        role = "user" if name == "prompt" else "assistant"
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise MelinoeError(
            f"{columns.where}: {name} has an unknown form",
            got=_kind(value),
            allowed="text, or a list of messages",
        )
    return [_message(message, columns.where) for message in value]


def _with_history(columns: _Columns, messages: list[Message]) -> tuple[list[Message], int]:
    """(the messages with `system` and `history` before them, how many these are)."""
    before: list[Message] = []
    for turn in columns.json("history", list) or []:
        if isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            before += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        elif isinstance(turn, dict):
            before.append(_message(turn, columns.where))
        else:
            raise MelinoeError(
                f"{columns.where}: the history has an unknown form",
                got=f"{json.dumps(turn, default=str)[:60]}",
                allowed="pairs of question and answer, or messages",
            )
    name = next((name for name in SYSTEM if columns.record.get(name)), None)
    system = columns.text(name) if name else ""
    if system:
        first = (before or messages)[0]
        if first["role"] == "system" and first.get("content") != system:
            raise MelinoeError(
                f"{columns.where}: the column {name} and the first message are two system messages",
                next_step="leave one of them",
            )
        if first["role"] != "system":
            before.insert(0, {"role": "system", "content": system})
    return [*before, *messages], len(before)


def _message(found: Any, where: str) -> Message:
    """A message as chat templates know it: role and content, tool calls with objects as arguments."""
    if not isinstance(found, dict):
        raise MelinoeError(f"{where}: a message is {_kind(found)}", allowed="an object with role and content")
    if "from" in found and "role" not in found:
        return _from_value(found, where)
    message = {name: value for name, value in found.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str):
        raise MelinoeError(f"{where}: a message lacks role or content", got=", ".join(found))
    message["role"] = _ROLES_OF_MESSAGES.get(role, role)
    if message.get("tool_calls"):
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise MelinoeError(f"{where}: tool_calls has an unknown form", got=_kind(calls), allowed="a list")
        message["tool_calls"] = [_tool_call(call, where) for call in calls]
    elif "tool_calls" in message:
        del message["tool_calls"]
    if "content" in message:
        message["content"] = _text_of(message["content"], where)
    elif not any(message.get(name) for name in ("tool_calls", *REASONING)):
        raise MelinoeError(f"{where}: a message lacks role or content", got=", ".join(found))
    else:
        message["content"] = ""  # templates add to it
    return message


def _from_value(found: dict[str, Any], where: str) -> Message:
    """ShareGPT's form of a message."""
    role, value = ROLES.get(str(found["from"]).lower()), found.get("value")
    if role is None:
        raise MelinoeError(f"{where}: a message is from {found['from']!r}", allowed=", ".join(sorted(ROLES)))
    if role == "function_call":
        call = _tool_call({"function": _json_of(value)}, where)
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    kept = {"weight": found["weight"]} if found.get("weight") is not None else {}
    return {"role": role, "content": _text_of(value, where), **kept}


def _text_of(content: Any, where: str) -> str:
    """Content as text: a string, or text in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MelinoeError(f"{where}: the content of a message is {_kind(content)}", allowed="text")
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type", "no type") if isinstance(part, dict) else _kind(part)
            raise MelinoeError(f"{where}: a part of a message is of type {kind}", allowed="text")
        parts.append(text)
    return "".join(parts)


def _json_of(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call as templates expect it; arguments that are JSON text become what they say."""
    function = call.get("function", call) if isinstance(call, dict) else None
    arguments = _json_of(function.get("arguments", {})) if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or arguments is None:
        raise MelinoeError(
            f"{where}: a tool call has an unknown form",
            got=json.dumps(call, default=str)[:80],
            allowed='{"function": {"name": ..., "arguments": {...}}}',
        )
    whole = call if "function" in call else {"type": "function", "function": call}
    return {"type": "function", **whole, "function": {**function, "arguments": arguments}}
