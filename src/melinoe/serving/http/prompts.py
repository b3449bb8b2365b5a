"""From what a client sent to token ids: chat template, tools, tokenizer, and what is refused on the way."""

from __future__ import annotations

import json
from typing import Any

from melinoe.data.chat import unwritten_role
from melinoe.data.encoding import encode_prompt
from melinoe.serving.http.errors import ApiError, too_long
from melinoe.serving.http.protocol import ChatRequest, Message


class Prompts:
    """Makes prompts for one model.

    Args:
        tokenizer: of transformers.
        num_embeddings: token ids from here on have no embedding.
        capacity: tokens of the longest prompt and answer.
    """

    def __init__(self, tokenizer: Any, num_embeddings: int, capacity: int) -> None:
        self._tokenizer, self._num_embeddings, self._capacity = tokenizer, num_embeddings, capacity
        # a text longer than this has too many tokens whatever they are; it is not even tokenized
        longest = max((len(token) for token in tokenizer.get_vocab()), default=1)
        self._most_characters = capacity * max(longest, 1)

    def of_chat(self, request: ChatRequest, param: str = "messages") -> list[int]:
        """Token ids of a conversation, ready for the answer. param: what the client calls it.

        Raises:
            ApiError: no template for it, or too long.
        """
        messages = [_for_template(message) for message in request.messages]
        tools = None
        if request.tools and request.tool_choice != "none":
            tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
        if not getattr(self._tokenizer, "chat_template", None):
            if tools:
                raise ApiError(400, "this model has no chat template, so it cannot take tools", param="tools")
            return self.of_text("".join(message["content"] for message in messages), param)
        self._check_length(sum(len(message["content"]) for message in messages), param)
        text = self._rendered(messages, param, tools)
        if tools and text == self._rendered(messages, param, None):
            raise ApiError(
                400, "this model's chat template does not write tools, so they would be lost", param="tools"
            )
        role = unwritten_role(messages, text, lambda changed: self._rendered(changed, param, tools) == text)
        if role is not None:
            raise ApiError(
                400,
                f"this model's chat template does not write {role} messages, so they would be lost",
                param=param,
            )
        return self.of_text(text, param, rendered=True)

    def _rendered(self, messages: list[dict[str, Any]], param: str, tools: list[Any] | None) -> str:
        settings = {"tools": tools} if tools else {}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **settings
                )
            )
        except Exception as error:  # the template is a program of the checkpoint's
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ApiError(
                400, f"the model's chat template refuses this conversation: {reason}", param=param
            ) from None

    def of_text(self, text: str, param: str, rendered: bool = False) -> list[int]:
        """Token ids of plain text, to be gone on with as `generate --raw` does.

        rendered: by a chat template, which has written every special token.
        """
        self._check_length(len(text), param)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ApiError(400, "the text holds half of a surrogate pair", param=param) from None
        if rendered:
            return self.of_ids(self._tokenizer(text, add_special_tokens=False)["input_ids"], param)
        return self.of_ids(encode_prompt(self._tokenizer, text, raw=True), param)

    def of_ids(self, ids: list[int], param: str) -> list[int]:
        """The ids, checked."""
        if not ids:
            raise ApiError(400, "the prompt is empty", param=param)
        if max(ids) >= self._num_embeddings:
            raise ApiError(
                400,
                f"token {max(ids)} is not in the model's vocabulary of {self._num_embeddings}",
                param=param,
            )
        return ids

    def _check_length(self, characters: int, param: str) -> None:
        if characters > self._most_characters:
            raise ApiError(
                400,
                f"This model's maximum context length is {self._capacity} tokens, and a text of {characters}"
                " characters has more.",
                param=param,
                code="context_length_exceeded",
            )

    def answer_length(self, prompt: list[int], wanted: int | None, param: str) -> int:
        """How many tokens the answer may have; None: whatever the context leaves.

        Raises:
            ApiError: too long together.
        """
        room = self._capacity - len(prompt)
        if room < 1 or (wanted is not None and wanted > room):
            raise too_long(len(prompt), wanted or 1, self._capacity, param)
        return wanted if wanted is not None else room


def _for_template(message: Message) -> dict[str, Any]:
    """A message as templates know it: content as text, arguments of calls as objects."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    result = message.model_dump(exclude_none=True) | {"content": content or ""}
    if message.role == "developer":  # the newer name of the same thing
        result["role"] = "system"
    for call in result.get("tool_calls", []):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return result


def _arguments(text: str) -> Any:
    """Templates write arguments with `tojson`; what is no JSON stays text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
