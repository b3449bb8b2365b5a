"""How seconds grow with size: replaying a trace, and opening a checkpoint in place.

    python benchmarks/scale.py --output result.json
    python benchmarks/scale.py --tokens 1000000 --layers 60 --experts 256        (the sizes of the issue)

Each size is measured at four values, doubling, the others fixed, and a line is fitted through the logarithms:
its slope is the exponent. 1 is linear, 2 quadratic. Seconds are of this process's own processor time, the
smaller of two.

    tokens    replaying a trace under decay and LRU, compiled (16 layers, 64 experts, top-8)
    objects   the same by the policies' own objects, at a fiftieth of the tokens
    layers    opening a checkpoint in place, first use and again
    experts   the same
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig
from transformers.utils import logging

from common import begin, close, parser_of, temporary_folder, write_result
from melinoe.routing import compiled
from melinoe.routing.simulate import simulate
from melinoe.routing.trace import Trace
from melinoe.runtime.load import load

PROMPT, ANSWER = 100, 150  # tokens of each sequence of the trace
HIDDEN, WIDTH = 16, 8  # of the checkpoint: its tensors are many and small


def random_trace(tokens: int, layers: int = 16, experts: int = 64, top_k: int = 8) -> Trace:
    """Sequences that like some experts better than others."""
    generator = np.random.default_rng(0)
    length = PROMPT + ANSWER
    sequences = max(1, tokens // length)
    indices = np.empty((sequences * length, layers, top_k), np.int16)
    for sequence in range(sequences):
        liking = generator.normal(0, 1.5, (layers, experts)).astype(np.float32)
        scores = liking + generator.gumbel(size=(length, layers, experts)).astype(np.float32)
        chosen = np.argpartition(-scores, top_k, axis=-1)[..., :top_k]
        indices[sequence * length : (sequence + 1) * length] = chosen
    sizes = [PROMPT, *[1] * ANSWER] * sequences
    ages = np.concatenate([np.arange(PROMPT - 1, -1, -1), np.zeros(ANSWER, int)])
    return Trace(
        indices=indices,
        call_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        call_phase=np.array([0, *[1] * ANSWER] * sequences),
        sequence=np.repeat(np.arange(sequences), length),
        ages=np.tile(ages, sequences),
        valid=np.ones(sequences * length, bool),
        token_ids=np.zeros(sequences * length),
        prompt_lengths=np.full(sequences, PROMPT),
        num_experts=experts,
    )


def write_checkpoint(folder: Path, layers: int, experts: int) -> None:
    """A Qwen3-MoE of many small experts, one shard for each layer."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=experts,
        num_experts_per_tok=min(8, experts),
        max_position_embeddings=128,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    config.save_pretrained(folder)
    names: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        names.update(dict.fromkeys(tensors, name))

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).bfloat16()

    for layer in range(layers):
        start = f"model.layers.{layer}."
        tensors = {f"{start}self_attn.{one}_proj.weight": weight(HIDDEN, HIDDEN) for one in "qkvo"}
        tensors |= {f"{start}self_attn.{one}_norm.weight": weight(8) for one in "qk"}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{start}{norm}.weight"] = weight(HIDDEN)
        tensors[f"{start}mlp.gate.weight"] = weight(experts, HIDDEN)
        for expert in range(experts):
            for part in ("gate", "up", "down"):
                shape = (HIDDEN, WIDTH) if part == "down" else (WIDTH, HIDDEN)
                tensors[f"{start}mlp.experts.{expert}.{part}_proj.weight"] = weight(*shape)
        write(f"model-{layer + 1:05d}.safetensors", tensors)
    rest = {"model.embed_tokens.weight": weight(64, HIDDEN), "lm_head.weight": weight(64, HIDDEN)}
    write("model-00000.safetensors", rest | {"model.norm.weight": weight(HIDDEN)})
    index = {"metadata": {"total_size": 0}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def seconds_of(work: Callable[[], object]) -> float:
    """Processor seconds, the smaller of two."""
    found = []
    for _ in range(2):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """The slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def doubling(largest: int) -> list[int]:
    return [largest // 8, largest // 4, largest // 2, largest]


def opening(layers: int, experts: int, folder: Path) -> dict[str, float]:
    """Seconds of the first use of a checkpoint and of the ones after."""
    checkpoint = folder / f"{layers}-{experts}"
    checkpoint.mkdir()
    write_checkpoint(checkpoint, layers, experts)
    began = time.process_time()
    close(load(checkpoint, slots=1))
    first = time.process_time() - began
    return {"first": first, "again": seconds_of(lambda: close(load(checkpoint, slots=1)))}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--experts", type=int, default=128)
    options = begin(parser)
    logging.disable_progress_bar()
    found: dict[str, Any] = {}

    def report(name: str, sizes: list[int], seconds: list[float]) -> None:
        slope = exponent(sizes, seconds)
        found[name] = {"sizes": sizes, "seconds": seconds, "exponent": slope}
        times = ", ".join(f"{size}: {one:.2f} s" for size, one in zip(sizes, seconds, strict=True))
        print(f"{name:<28} exponent {slope:.2f}   {times}", flush=True)

    for label, tokens, long in (("tokens", options.tokens, 0), ("objects", options.tokens // 50, 2**60)):
        compiled.LONG = long
        traces = [random_trace(size) for size in doubling(tokens)]
        for policy in ("decay", "lru"):
            simulate(traces[0], policy, 16)  # compiles
            times = [seconds_of(partial(simulate, trace, policy, 16)) for trace in traces]
            report(f"{label}, {policy}", [len(trace.indices) for trace in traces], times)
        del traces
    with temporary_folder("scale") as folder:
        os.environ["MELINOE_HOME"] = str(folder / "home")
        opening(2, 8, folder)  # imports
        for label, shapes in (
            ("layers", [(size, options.experts) for size in doubling(options.layers)]),
            ("experts", [(options.layers - 1, size) for size in doubling(options.experts)]),
        ):
            times_of = [opening(layers, experts, folder) for layers, experts in shapes]
            sizes = [shape[label == "experts"] for shape in shapes]
            for kind in ("first", "again"):
                report(f"opening by {label}, {kind}", sizes, [one[kind] for one in times_of])
    write_result(options, growth=found)


if __name__ == "__main__":
    main()
