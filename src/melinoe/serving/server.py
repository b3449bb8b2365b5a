"""A process that serves: the port first, then the model, then clients until SIGTERM."""

from __future__ import annotations

import math
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from melinoe.serving.engine.start import start_engine
from melinoe.serving.http.app import create_app
from melinoe.serving.http.service import Service
from melinoe.serving.listening import bind
from melinoe.serving.metrics import Metrics
from melinoe.serving.settings import ServeSettings

KEEP_ALIVE_SECONDS = 75  # clients reuse connections; their own limit should be the shorter one


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print("melinoe: ready", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._service.experts is not None:
            self._service.experts.close()  # those who look on must not keep it from leaving
        await super().shutdown(sockets)


def run(settings: ServeSettings, open_model: Callable[[], tuple[Any, Any]]) -> None:
    """Serves until SIGTERM or Ctrl-C; what is being answered then gets `drain_seconds`.

    Args:
        open_model: returns (model, tokenizer); called after the port has been taken.

    Raises:
        MelinoeError: the port is taken, or whatever loading says.
        KeyboardInterrupt: Ctrl-C.
    """
    listening = bind(settings)
    signal.signal(signal.SIGTERM, _leave)  # nothing to drain while loading
    began = time.perf_counter()
    model, tokenizer = open_model()
    engine = start_engine(model, tokenizer, settings)
    try:
        metrics = Metrics()
        metrics.load_seconds.set(time.perf_counter() - began)
        service = Service(model, tokenizer, engine, settings, metrics)
        host, port = listening.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"melinoe: a page to talk to it at http://{address}/", file=sys.stderr)
        print(
            f"melinoe: {settings.served_model_names[0]} at http://{address}/v1,"
            f" {engine.name}, {settings.concurrency} at once, {settings.queue} may wait,"
            f" up to {engine.capacity} tokens each",
            file=sys.stderr,
            flush=True,
        )
        server = _Server(
            uvicorn.Config(
                create_app(service),
                http="h11",
                loop="asyncio",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
            ),
            service,
        )
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn takes it over, and raises it again at its end
        server.run(sockets=[listening])
    finally:
        engine.stop()


def _leave(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)
