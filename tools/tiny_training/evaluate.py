"""How well the embedded model does its workload: exact match per task on rows it never saw.

`forced_match` needs one forward pass: where every token of the completion is the argmax given those
before it, greedy decoding writes exactly that completion. `generated_match` really generates, and
also scores the answer line alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from melinoe.tiny.workload import answer
from tiny_training.batches import encode

Scores = dict[str, dict[str, float]]


def _mean(sums: dict[str, list[dict[str, float]]]) -> Scores:
    means = {
        task: {name: sum(row[name] for row in found) / len(found) for name in found[0]}
        for task, found in sums.items()
    }
    overall = {
        name: sum(scores[name] for scores in means.values()) / len(means)
        for name in next(iter(means.values()))
    }
    return {**means, "overall": overall}


@torch.no_grad()
def forced_match(
    model: Any, tokenizer: Any, examples: Sequence[dict[str, str]], batch_size: int = 64
) -> Scores:
    """Per task: `loss` (nats per completion token) and `completion` (share predicted without a slip)."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    encoded = encode(tokenizer, examples)
    for start in range(0, len(examples), batch_size):
        chunk = encoded[start : start + batch_size]
        size = max(len(ids) for ids, _ in chunk)
        ids = torch.zeros(len(chunk), size, dtype=torch.long)
        for line, (tokens, _) in enumerate(chunk):
            ids[line, : len(tokens)] = torch.tensor(tokens)
        logits = model(input_ids=ids, use_cache=False).logits.float()  # right padding: no mask needed
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
        )
        hits = logits[:, :-1].argmax(-1) == ids[:, 1:]
        for line, (tokens, prompt_length) in enumerate(chunk):
            part = slice(prompt_length - 1, len(tokens) - 1)
            found[examples[start + line]["task"]].append(
                {"loss": float(losses[line, part].mean()), "completion": float(hits[line, part].all())}
            )
    return _mean(found)


@torch.no_grad()
def generated_match(
    model: Any, tokenizer: Any, examples: Sequence[dict[str, str]], batch_size: int = 128
) -> Scores:
    """Per task: share of greedy generations whose `answer`, and whose whole `completion`, is exact."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        chats = [
            tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], tokenize=False)
            for row in chunk
        ]
        inputs = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        outputs = model.generate(**inputs, max_new_tokens=120, do_sample=False)
        texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(chunk, texts, strict=True):
            found[row["task"]].append(
                {
                    "answer": float(answer(text) == answer(row["completion"])),
                    "completion": float(text == row["completion"]),
                }
            )
    return _mean(found)


def table(scores: Scores) -> str:
    """The scores as plain text, one task a line."""
    names = list(scores["overall"])
    lines = [f"{'task':<10}" + "".join(f"{name:>12}" for name in names)]
    lines += [
        f"{task:<10}" + "".join(f"{row[name]:>12.3f}" for name in names) for task, row in scores.items()
    ]
    return "\n".join(lines)
