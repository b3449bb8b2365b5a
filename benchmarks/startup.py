"""From typing a command to its first words: `melinoe generate` beside what it is built on.

    python benchmarks/startup.py --output startup.json

Contestants take turns. For each: seconds until something is shown, until the first token (stdout), and
processor seconds of the process, which other programs disturb less than the clock. `stock` is the same
prompt through transformers alone: AutoTokenizer, AutoModelForCausalLM, generate.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
import time
from typing import Any

from common import begin, parser_of, write_result
from melinoe.models.folder import resolve_model

STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
words = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
ids = words.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True,
                                return_tensors="pt", return_dict=True)
print(words.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0]))
"""


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--repeats", type=int, default=5)
    options = begin(parser)
    folder = str(resolve_model(options.model))
    commands = {
        "import torch, transformers": ["-c", "import torch, transformers; print()"],
        "stock": ["-c", STOCK, folder],
        "melinoe generate": ["-m", "melinoe", "generate", "--model", options.model, "-p", "hi"],
        "melinoe --help": ["-m", "melinoe", "--help"],
        "melinoe --version": ["-m", "melinoe", "--version"],
    }
    commands["melinoe generate"] += ["--max-new-tokens", "1", "--slots", "8"]
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(options.repeats):
        for name, command in commands.items():
            seen[name].append(_watched([sys.executable, *command]))
    rows = []
    for name, found in seen.items():
        row: dict[str, Any] = {"command": name}
        for key in found[0]:
            values = [one[key] for one in found]
            row |= {key: round(statistics.median(values), 3), f"{key}_least": round(min(values), 3)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    write_result(options, rows=rows)


def _watched(command: list[str]) -> dict[str, float]:
    """Seconds until the first byte on either stream, on stdout, until the end; and of processor time."""
    before, began = os.times(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    first: dict[int, float] = {}
    streams = [process.stdout.fileno(), process.stderr.fileno()]
    left = list(streams)
    while left:
        for stream in select.select(left, [], [])[0]:
            if not os.read(stream, 65536):
                left.remove(stream)
            first.setdefault(stream, time.perf_counter() - began)
    if process.wait():
        raise SystemExit(f"{command} failed")
    after = os.times()
    return {
        "shown_seconds": min(first.values()),
        "answer_seconds": first[streams[0]],
        "processor_seconds": after.children_user + after.children_system
        - before.children_user - before.children_system,
    }  # fmt: skip


if __name__ == "__main__":
    main()
