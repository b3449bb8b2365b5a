"""How good the mixture is, beside the dense model that it was cut from.

    python benchmarks/english/check.py FOLDER --data ../shared/data/gsm8k ../shared/data/t0mix --rows 100

FOLDER is what make.py wrote. NLL per answer token and Rouge-L on test rows, both models on the same rows, and
what both answer to a few questions, greedily.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from melinoe.data.encoding import encode_prompt
from melinoe.measure.intervals import ratio_of_sums
from melinoe.measure.quality import evaluate, greedy_completions

QUESTIONS = (
    "What is the capital of France? Answer in one sentence.",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "Tom has 3 boxes with 12 pencils each. He gives away 7 pencils. How many pencils are left?",
    "Is this review positive or negative? The food was cold and the waiter ignored us.",
)
NAMES = ("dense", "english")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=100, help="of each folder, for the likelihood")
    parser.add_argument("--completions", type=int, default=30, help="of each folder, for Rouge-L")
    parser.add_argument("--new-tokens", type=int, default=80)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    opened = {name: _open(options.folder / name, options.device) for name in NAMES}
    result: dict[str, Any] = {"data": {}, "answers": []}
    for data in options.data:
        result["data"][data.name] = _compare(opened, data, options)
    texts = {name: _answers(*pair, options.new_tokens) for name, pair in opened.items()}
    for number, question in enumerate(QUESTIONS):
        said = {name: texts[name][number] for name in NAMES}
        result["answers"].append({"question": question, **said})
        print(f"\n> {question}", *(f"{name}: {text}" for name, text in said.items()), sep="\n")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1))


def _open(folder: Path, device: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return model.to(device), AutoTokenizer.from_pretrained(folder)


def _compare(opened: dict[str, Any], data: Path, options: argparse.Namespace) -> dict[str, Any]:
    common: dict[str, Any] = {"progress": False, "max_length": 400}
    rows, found = {}, {}
    for name, pair in opened.items():
        scored = evaluate(pair, data, limit=options.rows, metrics="perplexity", per_row=True, **common)
        judged = evaluate(pair, data, limit=options.completions, metrics="rouge_l", **common)
        rows[name] = scored["per_row"]["nll"]
        found[name] = {"nll": scored["nll"], "rouge_l": judged["rouge_l"], "rows": scored["num_rows"]}
    ratio = ratio_of_sums(rows["english"], rows["dense"])
    for name in NAMES:
        print(f"| {data.name} | {name} | {found[name]['nll']:.3f} | {found[name]['rouge_l']:.3f} |")
    print(f"NLL over the dense model's: {ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
    return {**found, "nll_ratio": ratio}


def _answers(model: Any, tokenizer: Any, new_tokens: int) -> list[str]:
    prompts = [encode_prompt(tokenizer, question) for question in QUESTIONS]
    return greedy_completions(model, tokenizer, prompts, new_tokens, progress=False)


if __name__ == "__main__":
    main()
