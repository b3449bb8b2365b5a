"""POST /v1/responses: OpenAI's newer way to ask, for text. It is a chat request in other words.

Nothing is kept between requests: `store` and `previous_response_id` are refused, earlier turns are sent
along.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Field

from melinoe.serving.engine.request import EngineRequest
from melinoe.serving.engine.sampling import Choice
from melinoe.serving.http.answer import ClientGoneError, Item
from melinoe.serving.http.answer_json import usage
from melinoe.serving.http.errors import ApiError
from melinoe.serving.http.protocol import WHOLE, ChatRequest, No, Strict, Text, TextFormat, Whole


class Part(Strict):
    """Text of a message; what an earlier answer's part holds besides may be sent back while it is empty."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class InputMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]
    type: Literal["message"] | None = None
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class TextSettings(Strict):
    format: TextFormat | None = None


class ResponsesRequest(Strict):
    """POST /v1/responses."""

    model: str
    input: Text | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Whole | None = None
    text: TextSettings | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: No | None = None
    previous_response_id: None = None
    truncation: Literal["disabled"] | None = None
    user: str | None = None

    def as_chat(self) -> ChatRequest:
        """The same as a chat request."""
        said = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else []
        for message in self.input if isinstance(self.input, list) else ():
            content = message.content
            if isinstance(content, list):
                content = "".join(part.text for part in content)
            said.append({"role": message.role, "content": content})
        if self.instructions:
            said.insert(0, {"role": "system", "content": self.instructions})
        names = ("model", "stream", "temperature", "top_p", "seed", "user")
        return ChatRequest.model_validate({"messages": said, **{name: getattr(self, name) for name in names}})


class ResponsesJson:
    """Answers of /v1/responses, whole or as events."""

    def __init__(self, asked: ResponsesRequest) -> None:
        self.asked, self._created = asked, time.time()
        self.id, self._message = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"

    def content(self, text: str, choices: Sequence[Choice]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def answer(
        self, contents: list[dict[str, Any]], requests: Sequence[EngineRequest], reasons: list[str]
    ) -> dict[str, Any]:
        """The whole answer."""
        status = "incomplete" if reasons[0] == "length" else "completed"
        return self._frame(status, [self._item(status, contents)], requests)

    def _item(self, status: str, contents: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._message,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": contents,
        }

    def _frame(
        self, status: str, output: list[dict[str, Any]], requests: Sequence[EngineRequest] = ()
    ) -> dict[str, Any]:
        asked, counted = self.asked, None
        if requests:
            count = usage(requests)
            counted = {
                "input_tokens": count["prompt_tokens"],
                "input_tokens_details": count["prompt_tokens_details"],
                "output_tokens": count["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": count["total_tokens"],
            }
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": asked.model,
            "output": output,
            "parallel_tool_calls": bool(asked.parallel_tool_calls),
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": counted,
            "metadata": asked.metadata or {},
        }

    async def events(
        self, requests: Sequence[EngineRequest], first: Item, progress: AsyncIterator[Item]
    ) -> AsyncIterator[str]:
        """Server-sent events, numbered, with the whole answer in the last one."""
        number = 0

        def event(kind: str, **more: Any) -> str:
            nonlocal number
            body = {"type": kind, "sequence_number": number, **more}
            number += 1
            return f"event: {kind}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"

        place = {"item_id": self._message, "output_index": 0, "content_index": 0}
        text, reason = "", "stop"
        try:
            async with aclosing(progress) as items:  # type: ignore[type-var]
                for kind in ("response.created", "response.in_progress"):
                    yield event(kind, response=self._frame("in_progress", []))
                added = self._item("in_progress", [])
                yield event("response.output_item.added", output_index=0, item=added)
                yield event("response.content_part.added", **place, part=self.content("", ()))
                item = first[1]
                while True:
                    if item.text:
                        text += item.text
                        delta = {"delta": item.text, "logprobs": []}
                        yield event("response.output_text.delta", **place, **delta)
                    reason = item.finish_reason or reason
                    try:
                        _, item = await anext(items)
                    except StopAsyncIteration:
                        break
        except ApiError as error:
            found = error.body()["error"]
            yield event("error", code=found["code"], message=found["message"], param=found["param"])
        except ClientGoneError:
            return
        else:
            part = self.content(text, ())
            whole = self.answer([part], requests, [reason])
            yield event("response.output_text.done", **place, text=text, logprobs=[])
            yield event("response.content_part.done", **place, part=part)
            yield event("response.output_item.done", output_index=0, item=whole["output"][0])
            kind = "response.incomplete" if reason == "length" else "response.completed"
            yield event(kind, response=whole)
