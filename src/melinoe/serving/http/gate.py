"""What every HTTP request passes before it is read: the name it calls the server by, the key, its size.

A server without a key on one's own machine can be reached by every web page that the browser opens there. A
page cannot set the Host header, so a name other than the machine's own (DNS rebinding) gives it away; a
body that is not declared as JSON, which needs no permission of ours, is refused by FastAPI.
"""

from __future__ import annotations

import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from melinoe.serving.http.errors import ApiError

OPEN = ("/", "/health")  # the page asks for the key, and shows nothing without


class Gate:
    """ASGI middleware.

    Args:
        api_key: None: no key is asked for.
        host: where the server listens; on a loopback address only local names are answered.
        body_bytes: of the largest body.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, host: str, body_bytes: int) -> None:
        self._app, self._most = app, body_bytes
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self._local = {"localhost", "127.0.0.1", "::1", host} if _is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        error = self._error(scope["path"], Headers(scope=scope))
        if error is None:
            return await self._app(scope, self._bounded(receive), send)
        await JSONResponse(error.body(), error.status)(scope, receive, send)

    def _bounded(self, receive: Receive) -> Receive:
        """Counts what comes; a client need not say beforehand how much that will be."""
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise HTTPException(413, _too_large(self._most).message)
            return message

        return bounded

    def _error(self, path: str, headers: Headers) -> ApiError | None:
        if self._local is not None and _name(headers.get("host", "")) not in self._local:
            return ApiError(403, "this server answers to local names only", code="wrong_host")
        given = headers.get("authorization", "").encode("latin-1")
        free = self._expected is None or path in OPEN
        if not free and not hmac.compare_digest(given, self._expected or b""):
            return ApiError(
                401, "the API key is missing or wrong", "authentication_error", code="invalid_api_key"
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._most:
            return _too_large(self._most)
        return None


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", code="request_too_large")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(host: str) -> str:
    """`localhost` of `localhost:8000`, `::1` of `[::1]:8000`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
