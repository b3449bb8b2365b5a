"""Several replicas of a server behind one address, on Ray Serve.

Ray starts them, sends each request to the less busy of two, looks after their health and replaces those that
die. A replica is the application of one process (serving/http/app.py) with a model, an expert cache and a KV
cache of its own. Ray's router for HTTP does not see bodies, so a conversation need not come back to the
replica that knows its earlier turns.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from melinoe.errors import MelinoeError
from melinoe.serving.listening import bind
from melinoe.serving.settings import ServeSettings

HEALTH_SECONDS = 2.0
_service: Any = None  # of this process, if it is a replica


class Replica:
    """What Ray looks after; the application answers the requests."""

    def check_health(self) -> None:
        """Ray replaces a replica whose model cannot answer any more."""
        failure = _service.engine.failure if _service is not None else None
        if failure is not None:
            raise RuntimeError(failure)


def run_replicas(settings: ServeSettings, replicas: int, open_model: Callable[[], tuple[Any, Any]]) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Args:
        settings: of every replica; concurrency and queue are for each.
        open_model: returns (model, tokenizer); called in every replica.

    Raises:
        MelinoeError: the port is taken, or no replica comes up.
        KeyboardInterrupt: Ctrl-C.
    """
    import ray
    from ray import serve

    port = _free_port(settings)
    over = threading.Event()
    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, num_cpus=replicas + 1)
    try:
        signal.signal(signal.SIGTERM, lambda *_: over.set())  # now, because Ray takes it as well
        serve.start(http_options={"host": settings.host, "port": port})
        deployment = serve.deployment(
            serve.ingress(_builder(settings, open_model))(Replica),
            name="melinoe",
            num_replicas=replicas,
            max_ongoing_requests=settings.concurrency + settings.queue + 16,  # /health and the like besides
            ray_actor_options={"num_cpus": 1},
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_timeout_s=settings.drain_seconds,
        )
        try:
            serve.run(deployment.bind(), name="melinoe", logging_config={"enable_access_log": False})
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-300:]
            raise MelinoeError("no replica came up", got=reason) from None
        name = settings.served_model_names[0]
        print(
            f"melinoe: {name} at http://{settings.host}:{port}/v1, {replicas} replicas,"
            f" {settings.concurrency} at once in each",
            file=sys.stderr,
        )
        print("melinoe: ready", file=sys.stderr, flush=True)
        while not over.wait(1.0):
            pass
    finally:
        serve.shutdown()
        ray.shutdown()


def _builder(settings: ServeSettings, open_model: Callable[[], tuple[Any, Any]]) -> Callable[[], Any]:
    def build() -> Any:
        """The application, made in the replica's process."""
        from melinoe.serving import replicas
        from melinoe.serving.engine.start import start_engine
        from melinoe.serving.http.app import create_app
        from melinoe.serving.http.service import Service
        from melinoe.serving.metrics import Metrics

        began = time.perf_counter()
        model, tokenizer = open_model()
        metrics = Metrics()
        engine = start_engine(model, tokenizer, settings)
        metrics.load_seconds.set(time.perf_counter() - began)
        replicas._service = Service(model, tokenizer, engine, settings, metrics)
        return create_app(replicas._service)

    return build


def _free_port(settings: ServeSettings) -> int:
    """The port, which Ray needs to know beforehand; another program may still be faster than Ray."""
    with bind(settings) as trial:
        return int(trial.getsockname()[1])
