"""Resident memory of `melinoe serve` over many requests with prompts of every length.

    python benchmarks/server_memory.py --requests 1000 --output memory.json

What is to be seen is a line that becomes flat. Requests come from 16 clients, no two prompts alike; memory is
the process's own /metrics, after every hundred.
"""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

from common import begin, parser_of, temporary_folder, write_result
from serving import ask, gauge, server, server_options

CLIENTS = 16
MIB = 2**20


def main() -> None:
    parser = parser_of(__doc__)
    server_options(parser)
    parser.add_argument("--requests", type=int, default=1000)
    options = begin(parser)
    words = random.Random(0)
    prompts = [
        " ".join(str(words.randrange(1000)) for _ in range(words.randrange(1, 40)))
        for _ in range(options.requests)
    ]
    with (
        temporary_folder("server-memory") as folder,
        server(options, "batched", CLIENTS, folder / "log") as url,
    ):
        rows = []
        with ThreadPoolExecutor(CLIENTS) as pool:
            for start in range(0, len(prompts) + 1, 100):
                memory = gauge(url, "process_resident_memory_bytes")
                rows.append({"requests": start, "resident_mib": round(memory / MIB, 1)})
                print(json.dumps(rows[-1]), flush=True)
                some = [[{"role": "user", "content": text}] for text in prompts[start : start + 100]]
                list(pool.map(lambda messages: ask(url, messages, 12), some))
    write_result(options, rows=rows)


if __name__ == "__main__":
    main()
