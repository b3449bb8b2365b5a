"""Checkpoints of OLMoE-1B-7B's real shape and size whose routing is that of a real model.

    melinoe trace --model M --data D --split test --output base.trace     # M: 64 experts, 8 for a token
    melinoe trace --model M --adapter A --data D --split test --output tuned.trace
    python benchmarks/replayed_olmoe.py --folder F --trace base=base.trace --trace tuned=tuned.trace
    melinoe bench --model F/base --tuned F/tuned --data F/rows --memory 4GiB --record-bytes 0 --quality-rows 0

No trained model of this size can be had without a download, and routing of random weights says nothing of
what a cache is worth. So one is made that goes through a recorded trace by itself, in any engine, without a
hook: each token of the trace gets a token id of its own, whose embedding is a random direction; what
attention and experts add to it is scaled down until it moves nothing, but is computed as ever; the routers
are the least-squares solution that sends every such direction, in every layer, to the experts that the trace
names; and the output layer names the trace's next token. A greedy answer to the first tokens of a sequence
is then the rest of it, and its routing is the recorded one. This program checks the latter for every token
and layer in the weights as they are written, and the answers of every engine can be checked by their ids.

All folders share the shards of the layers by links: only routers differ. Where the trace has more layers
than the shape, evenly spaced ones are taken. F/rows holds the prompts as rows for `melinoe bench`.
Needs 14 GB of disk for 16 layers.
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import begin, parser_of, write_result
from melinoe.routing.trace import Trace
from random_olmoe import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    VOCABULARY,
    layer_tensors,
    shard_of,
    write_config,
    write_index,
    write_shard,
    write_tokenizer,
)

FIRST_ID = 100  # of the first token of the first sequence
ADDED = 1e-3  # scale of what a layer adds to the residual stream
CHOSEN, SUCCESSOR = 6.0, 30.0  # logits of the experts that are asked for, and of the next token
BETWEEN = 0.1  # of two chosen experts' logits that follow each other


def window(trace: Trace, sequence: int, prompt: int, new: int) -> np.ndarray:
    """[prompt + new, L, K] a prompt's last tokens and the first of its answer; empty: it is too short."""
    asked = trace.indices[(trace.sequence == sequence) & trace.valid]
    begin = int(trace.prompt_lengths[sequence]) - prompt
    if begin < 0 or begin + prompt + new > len(asked):
        return asked[:0]
    return asked[begin : begin + prompt + new]


def windows(
    traces: dict[str, Trace], layers: int, prompts: int, prompt: int, new: int
) -> dict[str, np.ndarray]:
    """{name: [prompts * (prompt + new), layers, K]} of the first sequences that are long enough in all."""
    first = next(iter(traces.values()))
    for name, trace in traces.items():
        shape = trace.num_experts, trace.indices.shape[2]
        if shape != (EXPERTS, TOP_K) or trace.num_layers < layers:
            raise SystemExit(f"{name}: {shape} experts in {trace.num_layers} layers, not {EXPERTS}, {TOP_K}")
        if not np.array_equal(trace.token_ids, first.token_ids):
            raise SystemExit(f"{name}: not the rows of the first trace")
    long_enough = [
        sequence for sequence in range(first.num_sequences) if len(window(first, sequence, prompt, new))
    ]
    if len(long_enough) < prompts:
        raise SystemExit(f"{len(long_enough)} sequences of {prompt} + {new} tokens, {prompts} are asked for")
    evenly = np.linspace(0, first.num_layers - 1, layers).round().astype(int)
    return {
        name: np.concatenate([window(trace, s, prompt, new)[:, evenly] for s in long_enough[:prompts]])
        for name, trace in traces.items()
    }


def directions(count: int) -> torch.Tensor:
    """[count, H] float32: the embeddings of the trace's tokens, as bfloat16 has them."""
    drawn = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1))
    return drawn.to(torch.bfloat16).float()


def routers(asked_TLK: np.ndarray, embeddings_TH: torch.Tensor) -> list[torch.Tensor]:
    """[E, H] bfloat16 for each layer.

    Raises:
        SystemExit: a token would be sent elsewhere.
    """
    normed = embeddings_TH / embeddings_TH.pow(2).mean(-1, keepdim=True).sqrt()
    inverse = torch.linalg.pinv(normed.double())
    found = []
    for layer in range(asked_TLK.shape[1]):
        chosen = torch.from_numpy(asked_TLK[:, layer].astype(np.int64))
        wanted = torch.zeros(len(chosen), EXPERTS, dtype=torch.float64)
        wanted.scatter_(1, chosen, (CHOSEN - BETWEEN * torch.arange(TOP_K)).double().expand(len(chosen), -1))
        weight = (inverse @ wanted).T.to(torch.bfloat16)
        own = (normed.to(torch.bfloat16) @ weight.T).topk(TOP_K, -1).indices
        if not torch.equal(own.sort().values, chosen.sort().values):
            raise SystemExit(f"layer {layer}: the routers do not send every token where the trace does")
        found.append(weight)
    return found


def other_tensors(embeddings_TH: torch.Tensor) -> dict[str, torch.Tensor]:
    """Embeddings, an output layer that names the next token, and the last norm."""
    generator, tokens = torch.Generator().manual_seed(0), len(embeddings_TH)
    embedded = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16).normal_(generator=generator)
    output = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
    embedded[FIRST_ID : FIRST_ID + tokens] = embeddings_TH.to(torch.bfloat16)
    output[FIRST_ID + 1 : FIRST_ID + tokens + 1] = (embeddings_TH * (SUCCESSOR / HIDDEN)).to(torch.bfloat16)
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return {"model.embed_tokens.weight": embedded, "lm_head.weight": output, "model.norm.weight": ones}


def write_shared(folder: Path, layers: int, embeddings_TH: torch.Tensor) -> list[Path]:
    """What all folders share: a shard for every layer without its router, and one for the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = [shard_of(folder, number, layers + 2) for number in range(layers + 1)]
    for layer, shard in enumerate(shards[:layers]):
        if not shard.exists():
            tensors = layer_tensors(layer, torch.Generator().manual_seed(layer), ADDED)
            del tensors[_router(layer)]
            write_shard(shard, tensors)
            del tensors
            gc.collect()
    write_shard(shards[layers], other_tensors(embeddings_TH))
    return shards


def _router(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.weight"


def write_folder(folder: Path, shared: list[Path], weights: list[torch.Tensor]) -> int:
    """A checkpoint: links to what is shared, and routers of its own. Returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, len(weights))
    write_tokenizer(folder)
    for shard in shared:
        here = folder / shard.name
        here.unlink(missing_ok=True)
        os.link(shard, here)
    own = {_router(layer): weight.contiguous() for layer, weight in enumerate(weights)}
    write_shard(shard_of(folder, len(weights) + 1, len(weights) + 2), own)
    return write_index(folder)


def write_rows(folder: Path, sequences: int, prompt: int, new: int) -> None:
    """Rows of the sequences; the word of a token id is w<id>."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for sequence in range(sequences):
        begin = FIRST_ID + sequence * (prompt + new)
        words = [f"w{token}" for token in range(begin, begin + prompt + new)]
        rows.append({"prompt": " ".join(words[:prompt]), "completion": " " + " ".join(words[prompt:])})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text(text)


def named(given: str) -> tuple[str, Path]:
    name, _, path = given.partition("=")
    return name, Path(path)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="a folder on a disk with 14 GB free")
    parser.add_argument("--trace", type=named, action="append", required=True, help="NAME=FILE")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = begin(parser)
    traces = {name: Trace.load(path) for name, path in options.trace}
    sizes = options.prompts, options.prompt_tokens, options.new_tokens
    asked = windows(traces, options.layers, *sizes)
    tokens = options.prompts * (options.prompt_tokens + options.new_tokens)
    if tokens > HIDDEN * 3 // 4:
        raise SystemExit(f"{tokens} tokens are too many for {HIDDEN} directions")
    embeddings = directions(tokens)
    made: dict[str, Any] = {}
    shared: list[Path] = []
    for name, asked_TLK in asked.items():
        weights = routers(asked_TLK, embeddings)
        shared = shared or write_shared(options.folder / "shared", options.layers, embeddings)
        made[name] = {"bytes": write_folder(options.folder / name, shared, weights)}
        print(f"{name}: {tokens} tokens in {options.layers} layers go where the trace sent them", flush=True)
    write_rows(options.folder / "rows", *sizes)
    options.trace = [f"{name}={path}" for name, path in options.trace]
    write_result(options, folders=made)


if __name__ == "__main__":
    main()
