"""Calls of tools in an answer, read by transformers' own parser where it has one for the model."""

from __future__ import annotations

import contextlib
import uuid
from typing import Any

from melinoe.serving.engine.request import EngineRequest
from melinoe.serving.http.protocol import ChatRequest


class ToolCalls:
    """Reads messages of one request; without a parser for the model an answer stays text.

    Args:
        tools: as the chat template got them.
    """

    def __init__(self, tokenizer: Any, model: Any, tools: list[dict[str, Any]]) -> None:
        self._tokenizer, self._model, self._tools = tokenizer, model, tools

    @classmethod
    def of(cls, tokenizer: Any, model: Any, request: ChatRequest) -> ToolCalls | None:
        """None where there is nothing to read."""
        from transformers.cli.serving.utils import get_response_template

        if not request.tools or request.tool_choice == "none":
            return None
        if get_response_template(tokenizer, model) is None:
            return None
        return cls(tokenizer, model, [tool.model_dump(exclude_none=True) for tool in request.tools])

    def message(self, request: EngineRequest, text: str, reason: str) -> tuple[dict[str, Any], str]:
        """(OpenAI's message, its finish_reason)."""
        from transformers.cli.serving.utils import parse_assistant_message

        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        with contextlib.suppress(Exception):  # what a model says need not be in its own format
            content, reasoning, calls = parse_assistant_message(
                self._tokenizer, self._model, request.tokens, request.prompt, text, self._tools
            )
            message["content"] = content or None
            if reasoning is not None:
                message["reasoning_content"] = reasoning
            if calls:
                message["tool_calls"] = [
                    {
                        "id": f"call_{uuid.uuid4().hex[:24]}",
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in calls
                ]
                reason = "tool_calls"
        return message, reason
