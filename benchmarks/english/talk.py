"""Conversations that the dense model makes up itself, as rows to train the mixture on.

    python benchmarks/english/talk.py FOLDER --rows 1000

Given the beginning of a user's turn a chat model writes a user's question, and given the question it answers
it (Magpie, arXiv:2406.08464); every other question is given its first word. So the mixture sees the kind of
text on which the dense model is asked to be itself, which tasks alone do not show it. Reads FOLDER/dense
(make.py writes it), writes FOLDER/talk/train.jsonl; a run that was interrupted goes on, and asking for more
rows adds them. On a GPU: --device cuda --batch 1024, several side by side with their own --name and --seed.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from dense import write_dense
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

QUESTION_TOKENS, ANSWER_TOKENS = 64, 192
QUESTION_TEMPERATURE, ANSWER_TEMPERATURE = 0.8, 0.7
NUCLEUS, MOST = 0.95, 128
PLACE = "PLACE"
# of every other question: what it makes up by itself is mostly a wish for advice
FIRST_WORDS = ("What is", "Who", "Why", "How", "Write", "Explain", "Where", "Give")


class Nucleus(LogitsProcessor):
    """Temperature and top-p, of the MOST likeliest tokens at most: no vocabulary is sorted for it."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] to scores, of which those of other tokens are -inf."""
        scores = scores.float() / self.temperature
        top = scores.topk(min(MOST, scores.shape[-1])).values
        share = (top - scores.logsumexp(-1, keepdim=True)).exp()
        kept = (share.cumsum(-1) - share < NUCLEUS).sum(-1, keepdim=True)
        return scores.masked_fill(scores < top.gather(-1, kept - 1), -torch.inf)


def conversations(
    model: Any, tokenizer: Any, seed: int, batch: int, seconds: float | None = None
) -> list[dict[str, str]]:
    """Up to `batch` rows of {prompt, completion}; a question that did not end, or came twice, is left out.

    seconds: after which answers end where they are.
    """
    until = None if seconds is None else time.monotonic() + seconds
    torch.manual_seed(seed)
    turn = [{"role": "user", "content": PLACE}]
    opening = tokenizer.apply_chat_template(turn, tokenize=False).split(PLACE)[0]
    begun = [FIRST_WORDS[number // 2 % len(FIRST_WORDS)] if number % 2 else "" for number in range(batch)]
    said = _say(model, tokenizer, [opening + beginning for beginning in begun], True, until)
    asked = [(word + text).strip() for word, (text, ended) in zip(begun, said, strict=True) if ended and text]
    questions = list(dict.fromkeys(asked))
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    answers = _say(model, tokenizer, prompts, False, until) if prompts else []
    return [
        {"prompt": question, "completion": kept}
        for question, (answer, ended) in zip(questions, answers, strict=True)
        if (kept := answer.strip() if ended else whole_sentences(answer))
    ]


def whole_sentences(text: str) -> str:
    """What stands before the last end of a sentence or line: who learns from it must not end in between."""
    ends = [found.end() for found in re.finditer(r"(?<!\d)[.!?][\"')]*(?=\s)|\n", text)]
    return text[: ends[-1]].strip() if ends else ""


def _say(
    model: Any, tokenizer: Any, texts: list[str], asks: bool, until: float | None
) -> list[tuple[str, bool]]:
    """For each text what the model says next, and whether it came to an end."""
    given = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    said = model.generate(
        **given.to(model.device),
        do_sample=True,
        logits_processor=[Nucleus(QUESTION_TEMPERATURE if asks else ANSWER_TEMPERATURE)],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_time=None if until is None else max(0.1, until - time.monotonic()),
        max_new_tokens=QUESTION_TOKENS if asks else ANSWER_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
    )[:, given["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    ended = (said == tokenizer.eos_token_id).any(-1).tolist()
    return list(zip(texts, ended, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the folder that make.py writes")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64, help="conversations side by side")
    parser.add_argument("--seconds", type=float, help="after which it ends with what there is")
    parser.add_argument("--name", default="talk", help="folder in FOLDER that is written")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    write_dense(options.folder / "dense")
    tokenizer = AutoTokenizer.from_pretrained(options.folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(options.folder / "dense", dtype=torch.bfloat16)
    model = model.to(options.device).eval()
    path = options.folder / options.name / "train.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seed, count = (written[-1]["seed"] + 1 if written else options.seed), len(written)
    began, longest, left = time.monotonic(), 0.0, None
    while count < options.rows:
        if options.seconds is not None:
            left = options.seconds - (time.monotonic() - began)
            if left < longest:  # another batch would not be through
                break
        at = time.monotonic()
        rows = conversations(model, tokenizer, seed, options.batch, left)
        longest = max(longest, time.monotonic() - at)
        with path.open("a") as file:  # a batch in one write, whole or not at all
            file.write("".join(json.dumps({**row, "seed": seed}) + "\n" for row in rows))
        seed, count = seed + 1, count + len(rows)
        print(f"{count} of {options.rows} rows", flush=True)


if __name__ == "__main__":
    main()
