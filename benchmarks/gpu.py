"""The runtime on a GPU: bus bandwidth, decode speed against resident and against accelerate (make gpu).

    python benchmarks/gpu.py --folder /big/disk --output benchmarks/gpu-NAME.json

Random weights of OLMoE-1B-7B's shape are written on the machine, so routing is even and hits are the worst a
model can have: what is measured is the machinery, not the method. Each contestant generates the same tokens from
the same prompts; a row of ours that generates other tokens than ours with every expert in its slots stops the run.
`--device cpu --layers 2` runs the same code without a GPU, for its own sake.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import accelerate
import torch
import transformers
from larger_than_memory import EXPERTS, VOCABULARY, write_checkpoint
from transformers import AutoModelForCausalLM

import melinoe
from melinoe.models.layers import experts_modules
from melinoe.runtime.load import reset_slots


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
    """Median decode speed over prompts, from the difference between a long and a one-token generation."""
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
        "decode_tokens_per_second": median(speeds),
        "range": [min(speeds), max(speeds)],
        "ttft_seconds": median(first_seconds),
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True, help="a folder on a disk with 30 GB free")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--output")
    options = parser.parse_args()
    folder, device = Path(options.folder), options.device
    source, stored = folder / f"olmoe-shape-{options.layers}", folder / f"olmoe-shape-{options.layers}-store"
    write_checkpoint(source, options.layers)
    shutil.rmtree(stored, ignore_errors=True)
    store = melinoe.convert(source, stored)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, VOCABULARY, (options.prompts, 64), generator=generator).to(device)
    bandwidth = bus_bandwidth(device, store.max_record_bytes)
    print(f"bus: {bandwidth / 1e9:.1f} GB/s for records of {store.max_record_bytes} bytes", flush=True)
    rows: list[dict[str, Any]] = []

    def contestant(name: str, model: Any) -> None:
        row = {"name": name, **measure(model, prompts, options.tokens, device)}
        if hasattr(model, "melinoe_paged"):
            found = melinoe.stats(model)
            row |= {"hit_rate": found.hit_rate, "bytes_per_token": found.bytes_per_token}
            reference = next((one["tokens"] for one in rows if one["name"] == "all in slots"), row["tokens"])
            if row["tokens"] != reference:
                raise SystemExit(f"{name}: other tokens than with all experts in slots")
            model.melinoe_paged.pager.close()
        rows.append(row)
        print(f"{name}: {row['decode_tokens_per_second']:.2f} tok/s", flush=True)

    quarter = EXPERTS // 4
    makers = {
        "resident": lambda: resident(source, device),
        "all in slots": lambda: melinoe.load(stored, slots=EXPERTS, device=device),
        "quarter, decay": lambda: melinoe.load(stored, slots=quarter, policy="decay", device=device),
        "quarter, lru": lambda: melinoe.load(stored, slots=quarter, policy="lru", device=device),
        "no cache": lambda: melinoe.load(stored, slots=0, policy="lru", device=device),
        "accelerate offload": lambda: accelerate_offload(source, device),
    }
    for name, make in makers.items():
        contestant(name, make())
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    speed = {row["name"]: row["decode_tokens_per_second"] for row in rows}
    moved = next(row["bytes_per_token"] for row in rows if row["name"] == "no cache")
    result = {
        "machine": {
            "device": torch.cuda.get_device_name() if device != "cpu" else platform.processor(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": vars(options),
        "bus_bytes_per_second": bandwidth,
        "ratios": {
            "all in slots / resident": speed["all in slots"] / speed["resident"],
            "no cache / bus ceiling": speed["no cache"] * moved / bandwidth,
            "quarter / accelerate": speed["quarter, decay"] / speed["accelerate offload"],
        },
        "rows": [{key: value for key, value in row.items() if key != "tokens"} for row in rows],
    }
    print(json.dumps(result["ratios"], indent=1))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
