"""What the weights of a row still know: NLL and Rouge-L beside the speed, for every precision that runs.

Ours is measured through the store that the row reads. Of a GGUF file the weights are measured: its experts,
expanded, in transformers. llama.cpp rounds activations besides, which is not in that number. It knows nothing
of sticky routing, so what it runs of tuned weights is measured without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from melinoe.benchmark.entries import BASE, LLAMA_CPP, OURS, Entry
from melinoe.benchmark.gguf_file import expand_experts
from melinoe.benchmark.prepare import Arena
from melinoe.data.rows import Row
from melinoe.measure.quality import evaluate
from melinoe.runtime.generation import stream_generate
from melinoe.runtime.load import load, load_resident, load_tokenizer
from melinoe.store.manifest import open_store

ANSWER_TOKENS = 64  # of the answer that is shown
COMPLETION_TOKENS = 32  # of a completion that is compared with its reference


def key_of(row: Entry) -> str:
    """Rows of the same weights in the same precision have the same quality."""
    precision = "auto" if row.precision in ("auto", "bf16") else row.precision
    plain = " as other engines route" if row.kind == LLAMA_CPP and row.weights != BASE else ""
    return f"{row.weights} {precision}{plain}"


def quality(arena: Arena, row: Entry, rows: list[Row], prompt: list[int]) -> dict[str, Any]:
    """{"nll", "rouge_l", "num_rows"} on the rows, and the "answer" to a prompt, which ends where it ends."""
    model: Any
    if row.kind == LLAMA_CPP and (row.precision != "bf16" or row.weights != BASE):
        model, tokenizer = load_resident(arena.checkpoints[row.weights], sticky=0.0)
        if row.precision != "bf16":
            expand_experts(model, arena.gguf[row.weights, row.precision])
    else:
        precision = row.precision if row.kind == OURS else "auto"
        path: Path = arena.stores[row.weights, precision]
        experts = max(layer.num_experts for layer in open_store(path).layers)
        model, tokenizer = load(path, slots=experts), load_tokenizer(path)
    with torch.no_grad():
        found = evaluate(
            (model, tokenizer),
            rows,
            metrics=("perplexity", "rouge_l"),
            max_new_tokens=COMPLETION_TOKENS,
            progress=False,
        )
        settings: dict[str, Any] = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0.0}
        answer = "".join(one.text for one in stream_generate(model, tokenizer, prompt, **settings))
    if hasattr(model, "melinoe_paged"):
        model.melinoe_paged.pager.close()
    return {name: found[name] for name in ("nll", "rouge_l", "num_rows")} | {"answer": answer.strip()}
