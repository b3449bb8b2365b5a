"""Servers for tests: `melinoe serve` as a process, or the same application in a thread of this one."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from melinoe.runtime.load import load_tokenizer
from melinoe.serving.engine.start import start_engine
from melinoe.serving.http.app import create_app
from melinoe.serving.http.service import Service
from melinoe.serving.metrics import Metrics
from melinoe.serving.settings import ServeSettings

ADDRESS = re.compile(r"at (http://\S+)/v1,")
START_SECONDS = 180


class Server:
    """Where a server is, and clients for it."""

    def __init__(self, url: str, key: str = "none") -> None:
        self.url, self.key = url, key
        headers = {"authorization": f"Bearer {key}"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False)

    def openai(self) -> openai.OpenAI:
        client = httpx.Client(timeout=120, trust_env=False)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, http_client=client)

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample of /metrics."""
        from prometheus_client.parser import text_string_to_metric_families

        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        raise KeyError(name)

    def idle(self, seconds: float = 1.0) -> bool:
        """Whether nothing is computed any more, within so many seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.metric("melinoe_requests_running") + self.metric("melinoe_requests_waiting") == 0:
                return True
            time.sleep(0.02)
        return False


class ServerProcess(Server):
    """`melinoe serve` with these arguments, ready."""

    def __init__(self, *arguments: str, log: Path, key: str = "none") -> None:
        command = [sys.executable, "-m", "melinoe", "serve", "--port", "0", *arguments]
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        until = time.monotonic() + START_SECONDS
        while "melinoe: ready" not in log.read_text():
            if self.process.poll() is not None or time.monotonic() > until:
                self.process.kill()
                raise AssertionError(log.read_text())
            time.sleep(0.05)
        found = ADDRESS.search(log.read_text())
        assert found is not None
        super().__init__(found[1], key)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def served(model: Any, source: str | Path, **settings: Any) -> Iterator[tuple[Server, Service]]:
    """The application around a model of this process, on a port of its own."""
    chosen = ServeSettings(**{"port": 0, "served_model_names": ("tiny",), **settings})
    tokenizer = load_tokenizer(source)
    engine = start_engine(model, tokenizer, chosen)
    service = Service(model, tokenizer, engine, chosen, Metrics())
    config = uvicorn.Config(
        create_app(service), port=0, http="h11", loop="asyncio", lifespan="off", log_level="error"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Server(f"http://127.0.0.1:{port}", chosen.api_key or "none"), service
    finally:
        server.should_exit = server.force_exit = True
        thread.join(timeout=10)
        engine.stop()
