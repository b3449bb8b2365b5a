"""Answers in OpenAI's words: whole, or as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from melinoe.serving.engine.request import EngineRequest, Progress
from melinoe.serving.engine.sampling import Choice


def usage(requests: Sequence[EngineRequest]) -> dict[str, Any]:
    """Numbers of tokens, all prompts together."""
    prompt = sum(len(request.prompt) for request in requests)
    answer = sum(len(request.tokens) for request in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(request.cached_tokens for request in requests)},
    }


class ChatJson:
    """Of /v1/chat/completions.

    Args:
        tokenizer: names tokens.
        model: what the client called it.
        logprobs: whether logarithms of probabilities are shown.
    """

    whole, part, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, tokenizer: Any, model: str, logprobs: bool) -> None:
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._head = {"created": int(time.time()), "model": model}

    def _frame(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, **self._head, "choices": choices, **more}

    def answer(
        self, contents: list[dict[str, Any]], requests: Sequence[EngineRequest], reasons: list[str]
    ) -> dict[str, Any]:
        """The whole answer. contents: what `content` made of each prompt's text and tokens."""
        choices = [
            {"index": index, "finish_reason": reason, **content}
            for index, (content, reason) in enumerate(zip(contents, reasons, strict=True))
        ]
        return self._frame(self.whole, choices, usage=usage(requests))

    def content(self, text: str, choices: Sequence[Choice]) -> dict[str, Any]:
        return {
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logarithms(choices, 0),
        }

    def begin(self, index: int) -> dict[str, Any]:
        """The first chunk: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._frame(
            self.part, [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]
        )

    def chunk(self, index: int, progress: Progress, shown: int) -> dict[str, Any]:
        """One piece. shown: characters before it."""
        delta = {"content": progress.text} if progress.text else {}
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logarithms(progress.choices, shown),
            "finish_reason": progress.finish_reason,
        }
        return self._frame(self.part, [choice])

    def calls(self, index: int, message: dict[str, Any], reason: str) -> dict[str, Any]:
        """A message with calls of tools, at once."""
        calls = [{"index": number, **call} for number, call in enumerate(message.get("tool_calls", []))]
        delta = {**message, **({"tool_calls": calls} if calls else {})}
        return self._frame(
            self.part, [{"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}]
        )

    def end(self, requests: Sequence[EngineRequest]) -> dict[str, Any]:
        """The chunk with the numbers of tokens."""
        return self._frame(self.part, [], usage=usage(requests))

    def _logarithms(self, choices: Sequence[Choice], shown: int) -> dict[str, Any] | None:
        if not self._logprobs or not choices:
            return None
        content = [
            {
                **self._token(choice.token, choice.logprob),
                "top_logprobs": [self._token(token, value) for token, value in choice.alternatives],
            }
            for choice in choices
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token])


class CompletionJson(ChatJson):
    """Of /v1/completions, which calls the same things otherwise."""

    whole, part, prefix = "text_completion", "text_completion", "cmpl"

    def content(self, text: str, choices: Sequence[Choice]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logarithms(choices, 0)}

    def chunk(self, index: int, progress: Progress, shown: int) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": progress.text,
            "logprobs": self._logarithms(progress.choices, shown),
            "finish_reason": progress.finish_reason,
        }
        return self._frame(self.part, [choice])

    def _logarithms(self, choices: Sequence[Choice], shown: int) -> dict[str, Any] | None:
        if not self._logprobs or not choices:
            return None
        tokens = [self._text(choice.token) for choice in choices]
        offsets = [shown + sum(map(len, tokens[:position])) for position in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [
                {self._text(token): value for token, value in choice.alternatives} for choice in choices
            ],
            "text_offset": offsets,
        }
