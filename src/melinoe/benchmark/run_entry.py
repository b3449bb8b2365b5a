"""One row of `melinoe bench`, once, in a process of its own.

It is started as `python -m melinoe.benchmark.run_entry TASK.json`.

Every request starts cold and greedy with a fixed number of tokens, so that all do the same work; one that
takes longer than `seconds` is cut there and says so. Prints one JSON object. llama.cpp's process imports
neither torch nor transformers: what they take is memory that it may use.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from melinoe.benchmark.entries import ACCELERATE, LLAMA_CPP, OURS, RESIDENT

WARM_UP_TOKENS = 8
BARE_SECONDS = 0.25  # of the bare reader, before and after each request


@dataclass(frozen=True)
class Task:
    """What a process is to do.

    path: a checkpoint, a store or a GGUF file. memory: bytes for a model of ours.
    ends: tokens that are never chosen. seconds: after which a request is cut.
    """

    kind: str
    path: str
    prompts: list[list[int]]
    new_tokens: int
    seconds: float
    threads: int = 1
    memory: int | None = None
    slots: int | None = None
    policy: str = "decay"
    predictor: str | None = None
    offload_folder: str | None = None
    repack: bool = False
    ends: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Request:
    """One request.

    times: seconds since it began at which each token came. tokens: those that came.
    waits, reads: until each token, seconds that the computation waited for a read, and in which one ran.
    """

    prompt_tokens: int
    tokens: list[int]
    times: list[float]
    counts: dict[str, Any]
    waits: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def disk_bytes() -> int:
    """Bytes that this process has had fetched from the disk, through mappings too; 0 where nobody counts."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)


def _llama_cpp(task: Task) -> dict[str, Any]:
    from melinoe.benchmark.llama_cpp import LlamaCpp

    longest = max(map(len, task.prompts)) + task.new_tokens + 1
    rival = LlamaCpp(task.path, longest, task.threads, repack=task.repack)
    rival.generate(task.prompts[0][:8], 2, task.ends)
    requests = []
    for prompt in task.prompts:
        before = disk_bytes()
        answer = rival.generate(prompt, task.new_tokens, task.ends, task.seconds, disk_bytes)
        first, last = answer.watched[0], answer.watched[-1]
        counts = {"prefill_bytes": first - before, "preload_bytes": 0, "decode_bytes": last - first}
        requests.append(Request(len(prompt), answer.tokens, answer.times, counts))
    return {"requests": [request.to_json() for request in requests], "slots": None}


def _transformers(task: Task) -> dict[str, Any]:
    """Stock transformers, accelerate and ours: what they share is `stream_generate`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from melinoe.demonstration.peers import load_disk_offloaded
    from melinoe.demonstration.watched import generate_watched
    from melinoe.runtime.load import load, load_tokenizer

    torch.set_num_threads(task.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if task.kind == RESIDENT:
        model = AutoModelForCausalLM.from_pretrained(task.path, dtype="auto").eval()
    elif task.kind == ACCELERATE:
        assert task.offload_folder is not None
        model = load_disk_offloaded(Path(task.path), Path(task.offload_folder))
    else:
        model = load(
            task.path, memory=task.memory, slots=task.slots, policy=task.policy, predictor=task.predictor,
            context=max(map(len, task.prompts)) + max(task.new_tokens, WARM_UP_TOKENS),
        )  # fmt: skip
    tokenizer = load_tokenizer(task.path)
    # warms up code, not slots: the first steps of a process also record the step, and may compile a kernel
    generate_watched(model, tokenizer, task.prompts[0][:8], WARM_UP_TOKENS)
    if task.kind == OURS:
        return _ours(task, model, tokenizer)
    requests = []
    for prompt in task.prompts:
        before = disk_bytes()
        watched: list[int] = []
        tokens, times = generate_watched(
            model, tokenizer, prompt, task.new_tokens, task.seconds, disk_bytes, watched
        )
        counts = {
            "prefill_bytes": watched[0] - before,
            "preload_bytes": 0,
            "decode_bytes": watched[-1] - watched[0],
        }
        requests.append(Request(len(prompt), tokens, times, counts))
    return {"requests": [request.to_json() for request in requests], "slots": None}


def _ours(task: Task, model: Any, tokenizer: Any) -> dict[str, Any]:
    from dataclasses import replace

    from melinoe.demonstration.watched import generate_watched
    from melinoe.runtime.bare_reader import record_bandwidth
    from melinoe.runtime.load import plan, reset_slots, stats

    pager = model.melinoe_paged.pager
    requests = []
    bare = [record_bandwidth(pager.store, BARE_SECONDS)]
    for prompt in task.prompts:
        reset_slots(model)
        before = replace(stats(model))
        read, busy = pager.reader.bytes_read, pager.reader.busy_seconds
        watched: list[tuple[float, float]] = []
        tokens, times = generate_watched(
            model,
            tokenizer,
            prompt,
            task.new_tokens,
            task.seconds,
            lambda: (stats(model).stalled_seconds, pager.reader.busy_seconds),
            watched,
        )
        waits = [waited - before.stalled_seconds for waited, _ in watched]
        reads = [ran - busy for _, ran in watched]
        counted = stats(model).since(before).to_json()
        read, busy = pager.reader.bytes_read - read, pager.reader.busy_seconds - busy
        groups = max(1, round(counted["decode_loads"] / max(1, len(tokens) - 1) / len(pager.store.layers)))
        bare.append(record_bandwidth(pager.store, BARE_SECONDS, seed=len(bare), group_sizes=(groups,)))
        counted |= {"read_bytes": read, "read_seconds": busy, "bare_bytes_per_second": max(bare[-2:])}
        requests.append(Request(len(prompt), tokens, times, counted, waits, reads))
    return {
        "requests": [request.to_json() for request in requests],
        "slots": plan(model).slots,
        "budget": asdict(plan(model)),
    }


def main(path: str) -> None:
    task = Task(**json.loads(Path(path).read_text()))
    result = _llama_cpp(task) if task.kind == LLAMA_CPP else _transformers(task)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
