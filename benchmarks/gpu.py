"""The runtime on a GPU: bus bandwidth, decode speed against resident and against accelerate (make gpu).

    python benchmarks/gpu.py --folder /big/disk --output benchmarks/gpu-NAME.json

Random weights of OLMoE-1B-7B's shape are written on the machine: what is measured is the machinery, not the
method. Greedy text of random weights soon repeats itself, so wherever there are slots nearly all is hits;
what misses cost is in the row without a cache, or in all rows with --sample. Rows of ours run twice: by
transformers' own loop, and with the step captured as one CUDA graph (`melinoe generate` does that). Each
contestant generates the same tokens from the same prompts; a row of ours that generates other tokens than
ours with every expert in its slots stops the run. Slots are empty at the beginning of every generation.
`--device cpu --layers 2` runs the same code without a GPU, for its own sake.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
from transformers import AutoModelForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer

import melinoe
from common import begin, close, parser_of, spread, write_result
from melinoe.decoding import loop
from melinoe.models.layers import experts_modules
from melinoe.runtime.load import reset_slots
from random_olmoe import EXPERTS, HIDDEN, INTERMEDIATE, VOCABULARY, write_olmoe

Row = dict[str, Any]
RECORD_BYTES = 3 * HIDDEN * INTERMEDIATE * 2  # of an expert in bfloat16


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


Generate = Callable[..., torch.Tensor]


class Clock(BaseStreamer):
    """When each token was there to be read."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def measure(
    generate: Generate,
    paged: Any,
    prompts: torch.Tensor,
    new_tokens: int,
    device: str,
    warm_up: tuple[int, ...] = (2, 4),
) -> Row:
    """Seconds to the first token, and tokens a second from there to the last, over prompts.

    paged: the model whose slots are emptied before each; None: there are none.
    """
    tokens, speeds, first_seconds = [], [], []
    for count in warm_up:  # the second one with the step that the first one has captured
        generate(prompts[:1], max_new_tokens=count, min_new_tokens=count)
    for prompt in prompts:
        if paged is not None:
            reset_slots(paged)
        synchronize(device)
        clock, began = Clock(), time.perf_counter()
        out = generate(prompt[None], max_new_tokens=new_tokens, min_new_tokens=new_tokens, streamer=clock)
        first, *_, last = clock.times[-new_tokens:]  # before them the prompt
        tokens.append(out[0].tolist())
        first_seconds.append(first - began)
        speeds.append((new_tokens - 1) / (last - first))
    return {
        "decode_tokens_per_second": spread(speeds),
        "ttft_seconds": spread(first_seconds),
        "tokens": tokens,
    }


def by_hand(model: Any, prompts: torch.Tensor, new_tokens: int, device: str) -> Row | None:
    """Stock transformers with its decode step captured by hand: the ceiling of a resident model.

    Greedy, nothing but the step and argmax; None where it cannot be captured.
    """
    speeds = []
    with torch.no_grad():
        for prompt in prompts:
            cache = StaticCache(config=model.config, max_cache_len=256)
            token = model(prompt[None], past_key_values=cache).logits[:, -1:].argmax(-1)
            position = torch.full((1, 1), len(prompt), device=device)

            def step(
                token: torch.Tensor = token, position: torch.Tensor = position, cache: Any = cache
            ) -> None:
                logits = model(token, position_ids=position, past_key_values=cache).logits
                token.copy_(logits[:, -1:].argmax(-1))
                position.add_(1)

            step()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    step()
            except RuntimeError as error:
                print(f"resident model: not captured: {str(error).splitlines()[0]}", flush=True)
                return None
            graph.replay()
            synchronize(device)
            began = time.perf_counter()
            for _ in range(new_tokens):
                graph.replay()
                token.item()  # as somebody who reads along does
            speeds.append(new_tokens / (time.perf_counter() - began))
    return {"decode_tokens_per_second": spread(speeds)}


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


def contestants(source: Path, stores: dict[str, Path], device: str) -> dict[str, Callable[[], Any]]:
    """What opens each model. All in slots comes before the other rows of ours, which are compared with it."""

    def ours(share: float, policy: str = "decay", format: str = "auto") -> Callable[[], Any]:
        slots = int(EXPERTS * share)
        return lambda: melinoe.load(stores[format], slots=slots, policy=policy, device=device)

    return {
        "resident": lambda: resident(source, device),
        "all in slots": ours(1),
        "half": ours(0.5),
        "quarter": ours(0.25),
        "quarter, lru": ours(0.25, "lru"),
        "no cache": ours(0, "lru"),
        "int8, all in slots": ours(1, format="int8"),
        "int8, half": ours(0.5, format="int8"),
        "int4, all in slots": ours(1, format="int4"),
        "accelerate offload": lambda: accelerate_offload(source, device),
    }


def choosing(generate: Generate, sample: bool) -> Generate:
    """`generate` with greedy tokens, or with tokens drawn by one seed."""
    choice = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}

    def chosen(ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return generate(ids, **choice, **settings)

    return chosen


def measured(name: str, model: Any, prompts: torch.Tensor, options: Any) -> dict[str, Row]:
    """The rows of one contestant, by name."""
    device, tokens = options.device, options.tokens
    paged = model if hasattr(model, "melinoe_paged") else None
    stock = choosing(model.generate, options.sample)
    if name == "accelerate offload":  # seconds a token: a few of them say enough
        return {name: measure(stock, None, prompts[:1], 3, device, warm_up=())}
    if paged is None:
        rows = {name: measure(stock, None, prompts, tokens, device)}
        found = by_hand(model, prompts, tokens, device) if device != "cpu" else None
        return rows | ({f"{name}, captured": found} if found else {})
    rows, ways = {}, {name: stock}
    if device != "cpu":
        ways[f"{name}, captured"] = choosing(partial(loop.generate, model), options.sample)
    for way, generate in ways.items():
        melinoe.stats(model).reset()
        row = measure(generate, paged, prompts, tokens, device)
        found = melinoe.stats(model)
        rows[way] = row | {"hit_rate": found.hit_rate, "bytes_per_token": found.bytes_per_token}
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="a folder on a disk with 40 GB free")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sample", action="store_true", help="draw the tokens, by one seed")
    parser.add_argument("--only", nargs="*", help="contestants; all of them")
    options = begin(parser)
    folder, device = options.folder, options.device
    source = folder / f"olmoe-shape-{options.layers}"
    write_olmoe(source, options.layers, device=device)
    wanted = options.only or list(contestants(source, {}, device))
    stores = {"auto": source}  # opened in place
    for format in ("int8", "int4"):
        stores[format] = folder / f"{source.name}-{format}"
        if not stores[format].exists() and any(name.startswith(format) for name in wanted):
            melinoe.convert(source, stores[format], format=format, progress=False)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, VOCABULARY, (options.prompts, 64), generator=generator).to(device)
    record_bytes = RECORD_BYTES
    bandwidth = bus_bandwidth(device, record_bytes)
    print(f"bus: {bandwidth / 1e9:.1f} GB/s for records of {record_bytes} bytes", flush=True)
    rows: dict[str, Row] = {}
    expected: dict[str, Any] = {}  # by format
    for name, open_model in contestants(source, stores, device).items():
        if name not in wanted:
            continue
        began = time.perf_counter()
        model = open_model()
        opened = time.perf_counter() - began
        for way, row in measured(name, model, prompts, options).items():
            if "hit_rate" in row:
                # attention rounds otherwise over a static cache, and int4 is another model
                kind = f"{name[:4] if name.startswith('int') else 'auto'}, {way != name}"
                if row["tokens"] != expected.setdefault(kind, row["tokens"]):
                    raise SystemExit(f"{way}: other tokens than with all experts in slots")
            rows[way] = row | {"open_seconds": opened}
            more = f", hits {row['hit_rate']:.3f}" if row.get("hit_rate") is not None else ""
            speed, first = row["decode_tokens_per_second"]["median"], row.get("ttft_seconds")
            more += f", first token after {first['median'] * 1e3:.0f} ms" if first else ""
            print(f"{way}: {speed:.2f} tok/s{more}, opened in {opened:.1f} s", flush=True)
        if hasattr(model, "melinoe_paged"):
            close(model)
        del model
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    speed = {name: row["decode_tokens_per_second"]["median"] for name, row in rows.items()}
    ratios = {
        f"{one} / {other}": speed[one] / speed[other]
        for one, other in (
            ("all in slots, captured", "resident"),
            ("all in slots, captured", "resident, captured"),
            ("quarter, captured", "quarter, lru"),
            ("quarter, captured", "accelerate offload"),
            ("half, captured", "accelerate offload"),
        )
        if one in speed and other in speed
    }
    for name, row in rows.items():
        if row.get("bytes_per_token"):
            ratios[f"{name}: bytes over the bus / bus"] = speed[name] * row["bytes_per_token"] / bandwidth
    print(json.dumps(ratios, indent=1))
    kept = {name: {key: row[key] for key in row if key != "tokens"} for name, row in rows.items()}
    write_result(options, bus_bytes_per_second=bandwidth, ratios=ratios, rows=kept)


if __name__ == "__main__":
    main()
