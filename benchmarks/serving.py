"""Throughput of `melinoe serve` by the number of clients, beside one request at a time, with the hit rate.

    python benchmarks/serving.py --model tiny --slots 8 --output serving.json

Clients share one expert cache. A token of one client can use what another has read, so bytes per token fall
with the number of clients; and their experts compete for slots, so the hit rate falls too. Both are shown.
Prompts are those of the test split, answers are greedy and all of one length.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from argparse import ArgumentParser
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import begin, parser_of, temporary_folder, write_result
from melinoe.data.rows import read_rows

COUNTERS = {
    "hits": 'melinoe_expert_cache_hits_total{phase="decode"}',
    "misses": 'melinoe_expert_cache_misses_total{phase="decode"}',
    "decode_bytes": 'melinoe_expert_transfer_bytes_total{phase="decode"}',
    "prefill_bytes": 'melinoe_expert_transfer_bytes_total{phase="prefill"}',
    "tokens": "melinoe_generated_tokens_total",
}


def main() -> None:
    parser = parser_of(__doc__)
    server_options(parser)
    parser.add_argument("--data", default="tiny")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    options = begin(parser)
    prompts = [list(row.messages) for row in read_rows(options.data, "test", limit=options.prompts)]
    rows = []
    with temporary_folder("serving") as folder:
        for engine, clients in [("one-at-a-time", 1), *(("batched", count) for count in options.clients)]:
            rows.append(_measured(options, prompts, engine, clients, folder / "log"))
            print(json.dumps(rows[-1]), flush=True)
    write_result(options, rows=rows)


def server_options(parser: ArgumentParser) -> None:
    """What `server` is told."""
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--predictor", type=Path)


@contextmanager
def server(options: Any, engine: str, concurrency: int, log: Path) -> Iterator[str]:
    """A cold server, and its address. options: model, slots, predictor."""
    command = [sys.executable, "-m", "melinoe", "serve", "--model", options.model, "--port", "0"]
    command += ["--slots", str(options.slots), "--engine", engine, "--concurrency", str(concurrency)]
    command += ["--served-model-name", "model"]
    command += ["--predictor", str(options.predictor)] if options.predictor else []
    with log.open("w") as errors:
        process = subprocess.Popen(command, stderr=errors, env=dict(os.environ))
    try:
        while "melinoe: ready" not in log.read_text():
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        found = re.search(r"at (http://\S+)/v1,", log.read_text())
        assert found is not None
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def _measured(
    options: Any, prompts: list[list[dict[str, str]]], engine: str, clients: int, log: Path
) -> dict[str, Any]:
    """One server, cold, and all prompts through so many clients."""
    with server(options, engine, max(options.clients), log) as url:
        before, began = _counters(url), time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda messages: ask(url, messages, options.tokens), prompts))
        seconds = time.perf_counter() - began
        after = _counters(url)
    new = {name: after[name] - before[name] for name in after}
    return {
        "engine": engine,
        "clients": clients,
        "tokens_per_second": new["tokens"] / seconds,
        "decode_hit_rate": new["hits"] / max(1, new["hits"] + new["misses"]),
        "bytes_per_token": (new["decode_bytes"] + new["prefill_bytes"]) / max(1, new["tokens"]),
        "seconds": seconds,
    }


def ask(url: str, messages: list[dict[str, str]], tokens: int) -> None:
    body = {"model": "model", "messages": messages, "max_tokens": tokens, "temperature": 0}
    data = json.dumps({**body, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        json.load(answer)


def gauge(url: str, sample: str) -> float:
    """One sample of /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    return float(lines[sample])


def _counters(url: str) -> dict[str, float]:
    return {name: gauge(url, sample) for name, sample in COUNTERS.items()}


if __name__ == "__main__":
    main()
