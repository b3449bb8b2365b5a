"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

INVALID, UNAVAILABLE, INTERNAL = "invalid_request_error", "service_unavailable_error", "server_error"


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one sentence for whoever reads the client's exception.
        kind: OpenAI's `type`.
        param: the field of the request that is to blame.
        code: a word that programs can look for.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": _writable(self.message),
                "type": self.kind,
                "param": _writable(self.param) if self.param is not None else None,
                "code": self.code,
            }
        }


def _writable(text: str) -> str:
    """Names of fields come from the client, and JSON can name what UTF-8 cannot write (lone surrogates)."""
    return text.encode("utf-8", "replace").decode("utf-8")


def unavailable(reason: str) -> ApiError:
    """The model cannot answer any more."""
    return ApiError(503, f"the model cannot answer: {reason}", UNAVAILABLE, code="engine_failed")


def too_long(prompt: int, answer: int, capacity: int, param: str) -> ApiError:
    """More tokens than the context has."""
    return ApiError(
        400,
        f"This model's maximum context length is {capacity} tokens, but {prompt + answer} were asked for"
        f" ({prompt} in the prompt, {answer} for the answer).",
        param=param,
        code="context_length_exceeded",
    )
