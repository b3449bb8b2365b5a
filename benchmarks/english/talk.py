"""Conversations that the dense model makes up itself, as rows to train the mixture on.

    python benchmarks/english/talk.py FOLDER --rows 1000

Given the beginning of a user's turn a chat model writes a user's question, and given the question it answers
it (Magpie, arXiv:2406.08464). So the mixture sees the kind of text on which the dense model is asked to be
itself, which tasks alone do not show it. Reads FOLDER/dense (make.py writes it), writes
FOLDER/talk/train.jsonl; a run that was interrupted goes on, and asking for more rows adds them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from dense import write_dense
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 64
QUESTION_TOKENS, ANSWER_TOKENS = 64, 192
QUESTION_TEMPERATURE, ANSWER_TEMPERATURE = 0.8, 0.7
PLACE = "PLACE"


def conversations(model: Any, tokenizer: Any, seed: int) -> list[dict[str, str]]:
    """Up to BATCH rows of {prompt, completion}; a question that did not end, or came twice, is left out."""
    torch.manual_seed(seed)
    turn = [{"role": "user", "content": PLACE}]
    opening = tokenizer.apply_chat_template(turn, tokenize=False).split(PLACE)[0]
    asked = [text for text, ended in _say(model, tokenizer, [opening] * BATCH, True) if ended and text]
    questions = list(dict.fromkeys(asked))
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    answers = _say(model, tokenizer, prompts, False)
    return [
        {"prompt": question, "completion": answer}
        for question, (answer, _) in zip(questions, answers, strict=True)
        if answer
    ]


def _say(model: Any, tokenizer: Any, texts: list[str], asks: bool) -> list[tuple[str, bool]]:
    """For each text what the model says next, and whether it came to an end."""
    given = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    said = model.generate(
        **given,
        do_sample=True,
        temperature=QUESTION_TEMPERATURE if asks else ANSWER_TEMPERATURE,
        top_p=0.95,
        top_k=0,
        max_new_tokens=QUESTION_TOKENS if asks else ANSWER_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
    )[:, given["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    ended = (said == tokenizer.eos_token_id).any(-1).tolist()
    return [(text.strip(), end) for text, end in zip(texts, ended, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the folder that make.py writes")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    write_dense(options.folder / "dense")
    tokenizer = AutoTokenizer.from_pretrained(options.folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(options.folder / "dense", dtype=torch.bfloat16).eval()
    path = options.folder / "talk" / "train.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seed, count = (written[-1]["seed"] + 1 if written else 0), len(written)
    while count < options.rows:
        rows = conversations(model, tokenizer, seed)
        with path.open("a") as file:  # a batch in one write, whole or not at all
            file.write("".join(json.dumps({**row, "seed": seed}) + "\n" for row in rows))
        seed, count = seed + 1, count + len(rows)
        print(f"{count} of {options.rows} rows", flush=True)


if __name__ == "__main__":
    main()
