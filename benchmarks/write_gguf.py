"""Writes a checkpoint as GGUF files and compares llama.cpp's tokens with transformers'.

    python benchmarks/write_gguf.py --model ../shared/models/t0-olmoe --folder /tmp/gguf --output result.json
    python benchmarks/write_gguf.py --model FOLDER --folder /tmp/gguf --precisions bf16,q8_0 --prompts 0

One file for each precision: f32, bf16, q8_0, q4_0. These are the experts' precisions; the rest is bf16, or
what --dense says. Then greedy answers of a fixed number of tokens to random prompts:

    f32     must be those of transformers in float32, token for token (attention as written on both sides)
    others  how many answers are those of transformers in bfloat16, and after how many tokens the others part;
            llama.cpp rounds in other places, so that a near tie may fall to the other side

Where --widen is given, the model is widened to records of that size first (melinoe.demonstration.widen).
Needs the packages gguf and xllamacpp: pip install 'melinoe-moe[bench]'.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from common import begin, parser_of, write_result
from melinoe.benchmark.gguf_file import write_gguf
from melinoe.benchmark.llama_cpp import LlamaCpp
from melinoe.config import format_bytes, parse_bytes
from melinoe.demonstration.widen import widen
from melinoe.models.folder import local_folder, resolve_model
from melinoe.models.pretrained import read_config
from melinoe.runtime.generation_settings import end_tokens
from melinoe.runtime.load import load_tokenizer


def transformers_answers(
    source: Path, dtype: torch.dtype, prompts: list[list[int]], new_tokens: int
) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager").eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        answers.append(whole[0, len(prompt) :].tolist())
    return answers


def agreement(own: list[list[int]], other: list[list[int]]) -> dict[str, Any]:
    """{answers that are equal, answers, tokens of the others before they part}."""
    shared = []
    for one, reference in zip(own, other, strict=True):
        pairs = zip(one, reference, strict=True)
        shared.append(next((i for i, (a, b) in enumerate(pairs) if a != b), len(one)))
    parted = [count for count, one in zip(shared, own, strict=True) if count < len(one)]
    return {"equal": len(shared) - len(parted), "answers": len(shared), "tokens_before_parting": parted}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where the files are written, and stay")
    parser.add_argument("--precisions", default="f32,bf16,q8_0,q4_0")
    parser.add_argument("--dense", help="precision of what is no expert's")
    parser.add_argument("--widen", help="bytes of a record, such as 3MiB")
    parser.add_argument("--prompts", type=int, default=8, help="0: write the files, compare nothing")
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=48)
    options = begin(parser)
    source = local_folder(resolve_model(options.model))
    if options.widen is not None:
        wide = options.folder / "wide"
        if not wide.is_dir():
            widen(source, wide, parse_bytes(options.widen))
        source = wide
    tokenizer, config = load_tokenizer(source), read_config(source)
    ends = end_tokens(GenerationConfig.from_pretrained(source), tokenizer)
    generator = np.random.default_rng(0)
    shape = (options.prompts, options.prompt_tokens)
    prompts = generator.integers(3, config.vocab_size, shape).tolist()
    files: dict[str, Any] = {}
    failed = False
    references: dict[torch.dtype, list[list[int]]] = {}
    for precision in options.precisions.split(","):
        path = options.folder / f"{precision}.gguf"
        files[precision] = write_gguf(source, path, precision, options.dense)
        print(f"{path}: {format_bytes(files[precision]['bytes'])}", flush=True)
        if not prompts:
            continue
        dtype = torch.float32 if precision == "f32" else torch.bfloat16
        if dtype not in references:
            references[dtype] = transformers_answers(source, dtype, prompts, options.new_tokens)
        rival = LlamaCpp(path, options.prompt_tokens + options.new_tokens + 1, exact=precision == "f32")
        own = [rival.generate(prompt, options.new_tokens, ends).tokens for prompt in prompts]
        rival.close()
        files[precision] |= agreement(own, references[dtype])
        print(f"  {files[precision]['equal']} of {len(prompts)} answers equal", flush=True)
        failed |= precision == "f32" and files[precision]["equal"] < len(prompts)
    write_result(options, files=files)
    if failed:
        sys.exit("llama.cpp in float32 gives other tokens than transformers in float32")


if __name__ == "__main__":
    main()
