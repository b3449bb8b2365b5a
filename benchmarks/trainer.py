"""What computing low rank inside the experts function is worth: our training step against PEFT's.

    python benchmarks/trainer.py --output result.json      (make bench-trainer)

    speed    time of a step of PEFT's target_parameters over ours (forward, backward, AdamW)     aim >= 3
    saved    bytes kept for the backward pass, parameters not counted: ours over PEFT's           aim <= 0.1
    equal    largest difference of logits and of gradients, over the largest value       must be below 1e-5

Both train the same OLMoE of random weights: routers and the experts' factors are trained, everything else is
frozen, the loss is the plain next-token loss. PEFT runs on transformers' grouped_mm, and with --eager on its
eager experts too; the faster one counts. Contestants take turns, `--rounds` times, in one process; a ratio is
taken within a round. PEFT forms W + dW of every expert in every pass, whatever the number of tokens, so both
ratios depend on tokens per step: several sizes are measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from common import begin, parser_of, spread, turns, write_result, written
from melinoe.config import format_bytes
from melinoe.experts.low_rank import EXPERTS_FUNCTION, attach_low_rank
from melinoe.models.layers import moe_layers
from random_olmoe import small_config

ALPHA = 16.0
VOCABULARY = 512
GROUPED, EAGER = "PEFT, grouped_mm", "PEFT, eager"


def base(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    shape = (options.hidden, options.inner, options.experts, options.layers, options.top_k)
    config = small_config(*shape, vocab_size=VOCABULARY, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    return model.requires_grad_(False)


def contestants(options: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[Any, Any, bool]]]:
    """(model by name, pairs): the models have the same factors.

    A pair is (our parameter, PEFT's over grouped_mm, whether it is an A).
    """
    ours = base(options)
    generator = torch.Generator().manual_seed(1)
    for layer in moe_layers(ours):
        low_rank = attach_low_rank(layer.experts, options.rank, ALPHA, generator)
        with torch.no_grad():
            for b in (low_rank.up_B, low_rank.down_B):  # not zero, or nothing would be compared
                b.copy_(torch.randn(b.shape, generator=generator) * 0.02)
        layer.router.float().requires_grad_(True)
    ours.set_experts_implementation(EXPERTS_FUNCTION)
    models, pairs = {"ours": ours}, []
    for name in (GROUPED, EAGER) if options.eager else (GROUPED,):
        model = base(options)
        model.set_experts_implementation(name.split(", ")[1])
        targets = [
            f"{layer.experts_name}.{weight}"
            for layer in moe_layers(model)
            for weight in ("gate_up_proj", "down_proj")
        ]
        config = peft.LoraConfig(
            r=options.rank,
            lora_alpha=ALPHA,
            target_modules=[],
            target_parameters=targets,
            modules_to_save=["gate"],
        )
        wrapped = peft.get_peft_model(model, config)
        theirs = {key.removeprefix("base_model.model."): value for key, value in wrapped.named_parameters()}
        for layer in moe_layers(ours):
            for projection, nest in (("up", ".base_layer"), ("down", "")):
                a, b = (theirs[f"{layer.experts_name}{nest}.lora_{x}.default.weight"] for x in "AB")
                mine_a, mine_b = layer.experts.low_rank.factors(projection)
                a.data = mine_a.detach().reshape(a.shape).clone().to(a.dtype)
                b.data = mine_b.detach().permute(1, 2, 0).reshape(b.shape).clone().to(b.dtype)
                if name == GROUPED:
                    pairs += [(mine_a, a, True), (mine_b, b, False)]
        models[name] = wrapped
    for model in models.values():
        model.train()
    return models, pairs


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)
    )


def saved_bytes(model: Any, ids: torch.Tensor) -> int:
    """Distinct storages that autograd keeps, those of parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, ids)
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def differences(
    models: dict[str, Any], pairs: list[tuple[Any, Any, bool]], ids: torch.Tensor
) -> dict[str, float]:
    """Of logits and gradients, over the largest value of each tensor."""

    def relative(mine: torch.Tensor, other: torch.Tensor) -> float:
        return float((mine - other).abs().max() / other.abs().max().clamp_min(1e-30))

    ours, theirs = models["ours"], models[GROUPED]
    with torch.no_grad():
        logits = relative(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    for model in (ours, theirs):
        model.zero_grad()
        loss_of(model, ids).backward()
    worst = 0.0
    for mine, other, is_a in pairs:
        experts = mine.shape[0]
        grad = other.grad
        grad = grad.reshape(mine.shape) if is_a else grad.reshape(len(grad), -1, experts).permute(2, 0, 1)
        worst = max(worst, relative(mine.grad, grad))
    routers = [p for name, p in theirs.named_parameters() if "modules_to_save" in name]
    for layer, other in zip(moe_layers(ours), routers, strict=True):
        worst = max(worst, relative(layer.router.weight.grad, other.grad))
    for model in (ours, theirs):
        model.zero_grad()
    return {"logits": logits, "gradients": worst}


def compare(
    models: dict[str, Any], pairs: list[tuple[Any, Any, bool]], tokens: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One size of step: what is equal, what is saved for the backward pass, and seconds per step in turns."""
    shape = (max(1, tokens // 64), min(tokens, 64))
    ids = torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(2))
    equal = differences(models, pairs, ids)
    if options.dtype == "float32":
        assert max(equal.values()) < 1e-5, equal
    saved = {name: saved_bytes(model, ids) for name, model in models.items()}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number, name in turns(list(models), options.rounds + 1):
        started = time.perf_counter()
        loss_of(models[name], ids).backward()
        optimizers[name].step()
        models[name].zero_grad()
        if number:  # the first round warms up
            seconds[name].append(time.perf_counter() - started)
    for name in models:
        print(
            f"| {tokens} | {name} | {written(seconds[name], 3)} | {format_bytes(saved[name])} |", flush=True
        )
    rival = min(set(models) - {"ours"}, key=lambda name: statistics.median(seconds[name]))
    return {
        "tokens": tokens,
        "seconds": seconds,
        "saved_bytes": saved,
        "rival": rival,
        "speed": spread([b / a for a, b in zip(seconds["ours"], seconds[rival], strict=True)]),
        "saved": saved["ours"] / saved[rival],
        "difference": equal,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--eager", action="store_true", help="PEFT over eager experts as well")
    parser.add_argument("--rounds", type=int, default=5)
    options = begin(parser)
    models, pairs = contestants(options)
    layers = moe_layers(models["ours"])
    expert_bytes = sum(p.nbytes for layer in layers for p in layer.experts.parameters(recurse=False))
    print(f"experts: {format_bytes(expert_bytes)} of {options.dtype}\n")
    print("| tokens per step | contestant | s/step (median, range) | saved for backward |")
    print("|---:|---|---:|---:|")
    sizes = [compare(models, pairs, tokens, options) for tokens in options.tokens]
    print()
    for size in sizes:
        speed = size["speed"]
        print(
            f"{size['tokens']} tokens: {speed['median']:.2f} times as fast as {size['rival']}"
            f" ({speed['lowest']:.2f} to {speed['highest']:.2f}), {size['saved']:.3f} of what it saves;"
            f" logits differ by {size['difference']['logits']:.1e},"
            f" gradients by {size['difference']['gradients']:.1e}"
        )
    write_result(options, peft=peft.__version__, expert_bytes=expert_bytes, sizes=sizes)


if __name__ == "__main__":
    main()
