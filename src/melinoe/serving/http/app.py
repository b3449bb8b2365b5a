"""The HTTP application: routes, and errors in OpenAI's shape whatever raises them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from melinoe._version import __version__
from melinoe.serving.http.errors import INTERNAL, ApiError
from melinoe.serving.http.gate import OPEN, Gate
from melinoe.serving.http.protocol import (
    Answer,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    ResponseBody,
)
from melinoe.serving.http.responses import ResponsesRequest
from melinoe.serving.http.service import Service, client_left
from melinoe.serving.http.validation import explain
from melinoe.serving.page import page

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong, or comes too early."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer it."},
}
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM: dict[str, Any] = {"text/event-stream": {"schema": EVENT}}
GENERATES: dict[int | str, dict[str, Any]] = {
    200: {"model": Answer, "description": "The answer; a stream of chunks if asked for.", "content": STREAM},
    **ERRORS,
}

RESPONSE: dict[str, Any] = {"model": ResponseBody, "description": "The response.", "content": STREAM}


def create_app(service: Service) -> FastAPI:
    """The application of one model."""
    app = FastAPI(
        title="melinoe",
        version=__version__,
        docs_url=None,  # the pages would be fetched from elsewhere
        redoc_url=None,
    )
    _add_routes(app, service)
    _add_page(app, service)
    _add_errors(app)
    settings = service.settings
    app.add_middleware(Gate, api_key=settings.api_key, host=settings.host, body_bytes=settings.body_bytes)
    _describe(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    names = service.settings.served_model_names

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.created, "owned_by": "melinoe"}

    @app.post("/v1/chat/completions", responses=GENERATES, response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        return await service.chat(body, request)

    @app.post("/v1/completions", responses=GENERATES, response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Goes on with a text, or with token ids."""
        return await service.complete(body, request)

    @app.post("/v1/responses", responses={**GENERATES, 200: RESPONSE}, response_model=None)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answers a conversation, in the newer interface's words; for text."""
        return await service.answer_response(body, request)

    @app.get("/v1/models", responses=ERRORS, response_model=ModelList)
    async def models() -> dict[str, Any]:
        """The names that this server answers to."""
        return {"object": "list", "data": [card(name) for name in names]}

    @app.get("/v1/models/{name:path}", responses=ERRORS, response_model=ModelCard)
    async def model(name: str) -> dict[str, Any]:
        """One of the names."""
        if name not in names:
            raise ApiError(404, f"no model {name!r} here", param="model", code="model_not_found")
        return card(name)

    unhealthy: dict[int | str, dict[str, Any]] = {
        503: {"model": Health, "description": "It cannot answer any more."}
    }

    @app.get("/health", responses={**ERRORS, **unhealthy}, response_model=Health)
    async def health() -> Response:
        """Whether the model can answer."""
        reason = service.engine.failure
        body = {"status": "ok" if reason is None else "failed", "reason": reason}
        return JSONResponse(body, 200 if reason is None else 503)

    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}, "description": "Numbers."}}

    @app.get("/metrics", responses={**ERRORS, **text}, response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI, service: Service) -> None:
    content, headers = page.load()

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return Response(content, media_type="text/html", headers=headers)

    @app.get("/experts", include_in_schema=False)  # a stream without an end, which the document cannot say
    async def experts(request: Request) -> Response:
        if service.experts is None:
            raise ApiError(404, "this model's experts are all in memory; there is nothing to watch")
        if service.experts.full:
            raise ApiError(
                429, "enough clients watch the experts already", "rate_limit_error", code="server_busy"
            )
        events = service.experts.watch(client_left(request))
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> Response:
        headers = {"retry-after": "1"} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        wrong = explain(error)
        return JSONResponse(wrong.body(), wrong.status)

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> Response:
        made = ApiError(error.status_code, str(error.detail))
        return JSONResponse(made.body(), made.status, headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        made = ApiError(500, f"unexpected {type(error).__name__}", INTERNAL, code="internal_error")
        return JSONResponse(made.body(), 500)


def _describe(app: FastAPI, service: Service) -> None:
    """What the document cannot take from the code: which models there are, and the key."""
    made = app.openapi()
    for name in ("ChatRequest", "CompletionRequest", "ResponsesRequest"):
        made["components"]["schemas"][name]["properties"]["model"]["enum"] = list(
            service.settings.served_model_names
        )
    if service.settings.api_key is not None:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in made["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if path in OPEN else [{"key": []}]
