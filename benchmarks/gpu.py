"""The runtime on a GPU: bus bandwidth, decode speed against resident and against accelerate (make gpu).

    python benchmarks/gpu.py --folder /big/disk --output benchmarks/gpu-NAME.json

Random weights of OLMoE-1B-7B's shape are written on the machine, so routing is even and hits are the worst
that a model can have: what is measured is the machinery, not the method. Each contestant generates the same
tokens from the same prompts; a row of ours that generates other tokens than ours with every expert in its
slots stops the run. `--device cpu --layers 2` runs the same code without a GPU, for its own sake.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from transformers import AutoModelForCausalLM

import melinoe
from common import begin, close, parser_of, spread, write_result
from melinoe.models.layers import experts_modules
from melinoe.runtime.load import reset_slots
from random_olmoe import EXPERTS, VOCABULARY, write_olmoe


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def bus_bandwidth(device: str, record_bytes: int, seconds: float = 2.0) -> float:
    """Bytes per second of records copied from pinned host memory, one stream."""
    pinned = torch.empty(16, record_bytes, dtype=torch.uint8, pin_memory=device != "cpu")
    target = torch.empty(record_bytes, dtype=torch.uint8, device=device)
    target.copy_(pinned[0])
    synchronize(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for record in pinned:
            target.copy_(record, non_blocking=True)
        synchronize(device)
        count += len(pinned)
    return count * record_bytes / (time.perf_counter() - began)


def measure(model: Any, prompts: torch.Tensor, new_tokens: int, device: str) -> dict[str, Any]:
    """Decode speed over prompts, from the difference between a long and a one-token generation."""
    tokens, speeds, first_seconds = [], [], []
    model.generate(prompts[:1], max_new_tokens=2, min_new_tokens=2, do_sample=False)
    for prompt in prompts:
        seconds = []
        for count in (1, new_tokens):
            if hasattr(model, "melinoe_paged"):
                reset_slots(model)
            synchronize(device)
            began = time.perf_counter()
            out = model.generate(prompt[None], max_new_tokens=count, min_new_tokens=count, do_sample=False)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
        tokens.append(out[0].tolist())
        first_seconds.append(seconds[0])
        speeds.append((new_tokens - 1) / (seconds[1] - seconds[0]))
    return {
        "decode_tokens_per_second": spread(speeds),
        "ttft_seconds": spread(first_seconds),
        "tokens": tokens,
    }


def resident(source: Path, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map={"": device}).eval()


def accelerate_offload(source: Path, device: str) -> Any:
    """The experts in host memory, moved layer by layer at every call; everything else on the device."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    experts = {name for name, _ in experts_modules(model)}
    for name, module in model.named_modules():
        if name in experts:
            accelerate.cpu_offload(module, execution_device=torch.device(device))
        elif not any(name.startswith(f"{other}.") for other in experts):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)
    return model


def contestants(source: Path, stored: Path, device: str) -> dict[str, Callable[[], Any]]:
    """What opens each model. All in slots comes before the other rows of ours, which are compared with it."""

    def ours(slots: int, policy: str = "decay") -> Callable[[], Any]:
        return lambda: melinoe.load(stored, slots=slots, policy=policy, device=device)

    return {
        "resident": lambda: resident(source, device),
        "all in slots": ours(EXPERTS),
        "quarter, decay": ours(EXPERTS // 4),
        "quarter, lru": ours(EXPERTS // 4, "lru"),
        "no cache": ours(0, "lru"),
        "accelerate offload": lambda: accelerate_offload(source, device),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="a folder on a disk with 30 GB free")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    options = begin(parser)
    folder, device = options.folder, options.device
    source, stored = folder / f"olmoe-shape-{options.layers}", folder / f"olmoe-shape-{options.layers}-store"
    write_olmoe(source, options.layers, device=device)
    shutil.rmtree(stored, ignore_errors=True)
    store = melinoe.convert(source, stored)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, VOCABULARY, (options.prompts, 64), generator=generator).to(device)
    bandwidth = bus_bandwidth(device, store.max_record_bytes)
    print(f"bus: {bandwidth / 1e9:.1f} GB/s for records of {store.max_record_bytes} bytes", flush=True)
    rows: dict[str, dict[str, Any]] = {}
    for name, open_model in contestants(source, stored, device).items():
        model = open_model()
        slow = name == "accelerate offload"  # seconds a token: a few of them say enough
        row = measure(model, prompts[:1] if slow else prompts, 5 if slow else options.tokens, device)
        if hasattr(model, "melinoe_paged"):
            found = melinoe.stats(model)
            row |= {"hit_rate": found.hit_rate, "bytes_per_token": found.bytes_per_token}
            if row["tokens"] != rows.get("all in slots", row)["tokens"]:
                raise SystemExit(f"{name}: other tokens than with all experts in slots")
            close(model)
        rows[name] = row
        print(f"{name}: {row['decode_tokens_per_second']['median']:.2f} tok/s", flush=True)
        del model
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    speed = {name: row["decode_tokens_per_second"]["median"] for name, row in rows.items()}
    ratios = {
        "all in slots / resident": speed["all in slots"] / speed["resident"],
        "no cache / bus ceiling": speed["no cache"] * rows["no cache"]["bytes_per_token"] / bandwidth,
        "quarter / accelerate": speed["quarter, decay"] / speed["accelerate offload"],
    }
    print(json.dumps(ratios, indent=1))
    kept = {name: {key: row[key] for key in row if key != "tokens"} for name, row in rows.items()}
    write_result(options, bus_bytes_per_second=bandwidth, ratios=ratios, rows=kept)


if __name__ == "__main__":
    main()
