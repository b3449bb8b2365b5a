"""What FastAPI finds wrong with a body, in OpenAI's words: one sentence, and the field it is about."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError

from melinoe.serving.http.errors import ApiError


def explain(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong."""
    found = [(_field(wrong, error.body), wrong) for wrong in error.errors()]
    field, first = found[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not JSON: {reason}", code="invalid_json")
    if not field:
        return ApiError(
            400, "the body is not a JSON object (with content-type: application/json)", code="invalid_type"
        )
    # where several types were tried, the one that fits says more than that it is another
    alternatives = (pair for pair in found if pair[0].startswith(field) and not _is_of_type(pair[1]))
    field, first = next(alternatives, found[0])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {field}", param=field, code="unknown_parameter")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{field}: {first['msg']}", param=field, code=code)


def _is_of_type(wrong: Any) -> bool:
    return str(wrong["type"]).endswith("_type")


def _field(wrong: Any, body: Any) -> str:
    """`messages[0].content`; pydantic's place also names the types that it tried."""
    names, value = [], body
    parts = wrong["loc"][1:]
    for position, part in enumerate(parts):
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            last = position == len(parts) - 1
            if not (last and wrong["type"] in ("missing", "extra_forbidden")):
                continue
        names.append(f"[{part}]" if isinstance(part, int) else f".{part}")
    return "".join(names).removeprefix(".")
