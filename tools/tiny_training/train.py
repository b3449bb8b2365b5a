"""Trains the embedded model, `--model tiny`, in two runs.

    PYTHONPATH=tools python -m tiny_training.train --output-dir D --minutes 85 --tasks stepwise \\
        --extra lookup,count,divide,compare
    PYTHONPATH=tools python -m tiny_training.train --output-dir E --steps 2000 --start-from D/model \\
        --peak-rate 1e-3 --seed 1

A small OLMoE (6 layers, 32 experts, top-4, width 128) learns the workload from rows made on the fly: first
the tasks with written steps, then all of them. A run is seeded; with `--steps` it is the same run every time,
with `--minutes` the learning rate follows the clock. `--resume` continues from D/checkpoint.safetensors;
D/model always holds the latest weights in bfloat16 with tokenizer and train_report.json. `--evaluate` scores
D/model by generation on rows of the test split. Progress goes to stderr, the final table to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from melinoe.files import whole_file, whole_folder
from melinoe.tiny.workload import STEPWISE, TASKS, rows
from tiny_training import evaluate, experts
from tiny_training.batches import Batch, batches
from tiny_training.tokenizer import build_tokenizer

LINES, SIZE = 32, 128  # one step is 32 packed lines of 128 tokens
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 150
DECAY_FROM = 0.35  # the learning rate is flat up to this share of the run, then falls linearly to 0
BALANCE_WEIGHT = 0.01


def make_config(vocabulary: int) -> Any:
    """OLMoE's shape, small: 5.3 million parameters, 10.6 MB in bfloat16."""
    from transformers import OlmoeConfig

    return OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        router_aux_loss_coef=BALANCE_WEIGHT,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )


def loss_function(model: Any, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over completion tokens plus the load-balancing loss, averaged over layers."""
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    config = model.config
    out = model.model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=batch.mask,
        use_cache=False,
        output_router_logits=True,
    )
    logits = model.lm_head(out.last_hidden_state)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
    balance = sum(
        load_balancing_loss_func((layer,), config.num_experts, config.num_experts_per_tok)
        for layer in out.router_logits
    ) / len(out.router_logits)
    return loss + BALANCE_WEIGHT * (balance - config.num_experts_per_tok)


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Warm-up, flat, then linear to zero; `progress` runs from 0 to 1 over the run."""
    decay = 1.0 if progress < DECAY_FROM else max(0.0, (1 - progress) / (1 - DECAY_FROM))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * decay


def make_optimizer(model: torch.nn.Module, peak: float) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-9, fused=True)


def export(model: Any, tokenizer: Any, report: dict[str, Any], folder: Path) -> None:
    """Weights in bfloat16, tokenizer and report, as from_pretrained reads them."""
    from transformers import OlmoeForCausalLM

    copy = OlmoeForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    with whole_folder(folder) as new:
        copy.to(torch.bfloat16).save_pretrained(new)
        tokenizer.save_pretrained(str(new))
        (new / "train_report.json").write_text(json.dumps(report, indent=1) + "\n")
        for path in new.iterdir():
            path.chmod(0o644)


def save_checkpoint(model: Any, optimizer: torch.optim.AdamW, state: dict[str, Any], folder: Path) -> None:
    """Model, optimizer moments and position in the run; one file, replaced at once."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = optimizer.state[p][key]
    with whole_file(folder / "checkpoint.safetensors") as partial:
        save_file(tensors, partial, metadata={"state": json.dumps(state)})


def load_checkpoint(model: Any, optimizer: torch.optim.AdamW, folder: Path) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote; returns the state."""
    from safetensors import safe_open

    path = folder / "checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["state"])
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
            optimizer.state[p] = {
                "step": torch.tensor(float(state["step"])),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
    return state


def train(options: argparse.Namespace) -> None:
    """The whole run: see the module docstring."""
    from transformers import AutoTokenizer, OlmoeForCausalLM

    torch.manual_seed(options.seed)
    output = Path(options.output_dir)
    before = None  # the report of the run that this one starts from
    if options.start_from:
        tokenizer = AutoTokenizer.from_pretrained(options.start_from)  # another would undo what was learned
        before = json.loads((Path(options.start_from) / "train_report.json").read_text())
    else:
        tokenizer = build_tokenizer(options.seed)
    config = make_config(len(tokenizer))
    config._experts_implementation = experts.register(compile_kernels=options.compile)
    config._attn_implementation = "sdpa"
    model = OlmoeForCausalLM(config).train()
    if options.start_from:
        weights = OlmoeForCausalLM.from_pretrained(options.start_from, dtype=torch.float32).state_dict()
        model.load_state_dict(weights)
    optimizer = make_optimizer(model, options.peak_rate)
    state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "block": 0, "seed": options.seed}
    if options.resume:
        state = load_checkpoint(model, optimizer, output)
        state["block"] += 1  # the rest of the interrupted block is left out
        state["resumed_at_steps"] = [*state.get("resumed_at_steps", []), state["step"]]
    compute = torch.compile(loss_function, dynamic=False) if options.compile else loss_function
    tasks = list(STEPWISE if options.tasks == "stepwise" else TASKS)
    extra = [name for name in (options.extra or "").split(",") if name]
    source = batches(tokenizer, options.seed, LINES, SIZE, state["block"], [*tasks, *extra])
    valid = rows("valid", 20 * len(tasks), 1, tasks)
    started, saved, smooth = time.monotonic() - state["seconds"], time.monotonic(), 0.0
    logged = (time.monotonic(), state["tokens"])

    def report(scores: dict[str, Any] | None = None) -> dict[str, Any]:
        return {
            **state,
            "minutes": round(state["seconds"] / 60, 1),
            "tasks": options.tasks,
            "extra_tasks": extra,
            "before": before,
            "command": "python -m tiny_training.train " + " ".join(sys.argv[1:]),
            "config": config.to_diff_dict(),
            "valid": scores,
        }

    while True:
        seconds = time.monotonic() - started
        progress = max(
            seconds / (60 * options.minutes) if options.minutes else 0.0,
            state["step"] / options.steps if options.steps else 0.0,
        )
        if progress >= 1:
            break
        block, batch = next(source)
        rate = learning_rate(options.peak_rate, state["step"], progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = compute(model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value = float(loss.detach())
        smooth = value if not smooth else 0.98 * smooth + 0.02 * value
        state |= {"step": state["step"] + 1, "block": block, "seconds": time.monotonic() - started}
        state["tokens"] += int((batch.ids != 0).sum())
        if state["step"] % 50 == 0:
            now = time.monotonic()
            speed = (state["tokens"] - logged[1]) / (now - logged[0])
            logged = (now, state["tokens"])
            line = (
                f"step {state['step']} {state['seconds'] / 60:.1f} min loss {smooth:.4f} "
                f"norm {float(norm):.2f} rate {rate:.2e} {speed:.0f} tok/s "
                f"{state['tokens'] / 1e6:.2f}M tokens"
            )
            print(line, file=sys.stderr, flush=True)
        if time.monotonic() - saved > 60 * options.save_minutes:
            scores = evaluate.forced_match(model, tokenizer, valid)
            print(evaluate.table(scores), file=sys.stderr, flush=True)
            save_checkpoint(model, optimizer, state, output)
            export(model, tokenizer, report(scores), output / "model")
            saved = time.monotonic()
    scores = evaluate.forced_match(model, tokenizer, valid)
    print(evaluate.table(scores), file=sys.stderr, flush=True)
    save_checkpoint(model, optimizer, state, output)
    export(model, tokenizer, report(scores), output / "model")


def score(folder: Path, rows_per_task: int) -> None:
    """Generate on unseen test rows, print the table and write it into train_report.json."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    examples = rows("test", rows_per_task * len(TASKS), 0)
    scores = evaluate.generated_match(model, tokenizer, examples)
    for task, row in evaluate.forced_match(model, tokenizer, examples).items():
        scores[task]["loss"] = row["loss"]
    print(evaluate.table(scores), flush=True)
    path = folder / "train_report.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found["test"] = {"rows_per_task": rows_per_task, "scores": scores}
    path.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tiny_training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--minutes", type=float, help="length of the run on the clock")
    parser.add_argument("--steps", type=int, help="length of the run in steps (reproducible)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--tasks", choices=("all", "stepwise"), default="all")
    parser.add_argument("--start-from", help="weights to start with: the model folder of an earlier run")
    parser.add_argument("--peak-rate", type=float, default=PEAK_LEARNING_RATE)
    parser.add_argument("--extra", help="tasks that come once more often, separated by commas")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--evaluate", type=int, metavar="ROWS", help="only score D/model on ROWS rows of each task"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if options.evaluate:
        score(Path(options.output_dir) / "model", options.evaluate)
    elif options.minutes or options.steps:
        train(options)
    else:
        parser.error("--minutes, --steps or --evaluate is needed")


if __name__ == "__main__":
    main()
