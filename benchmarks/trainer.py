"""What computing low rank inside the experts function is worth: our training step against PEFT's on the same model.

    python benchmarks/trainer.py --output result.json      (make bench-trainer)

    speed    time of a step of PEFT's target_parameters over ours (forward, backward, AdamW)         aim >= 3
    saved    bytes kept for the backward pass, parameters not counted: ours over PEFT's               aim <= 0.1
    equal    largest difference of logits and of gradients, over the largest value                   must be < 1e-5

An OLMoE of random weights; routers and experts' factors are trained, everything else is frozen, the loss is the plain next-token
loss for both. PEFT runs on transformers' grouped_mm, and with --eager on its eager experts too; the faster one counts.
Contestants take turns, `--rounds` times, in one process; a ratio is taken within a round. PEFT forms W + dW of every expert in every
pass, whatever the number of tokens, so both ratios depend on tokens per step: several sizes are measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, OlmoeConfig

from melinoe.config import format_bytes
from melinoe.experts.low_rank import EXPERTS_FUNCTION, attach_low_rank
from melinoe.models.layers import moe_layers

ALPHA = 16.0
GROUPED, EAGER = "PEFT, grouped_mm", "PEFT, eager"


def base(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=512,
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    return model.requires_grad_(False)


def contestants(options: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[Any, Any, bool]]]:
    """(model by name, all with the same factors; (our parameter, PEFT's, whether it is an A) of the grouped_mm one)."""
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models, pairs = contestants(options)
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        for name, model in models.items()
    }
    experts = sum(
        p.nbytes for layer in moe_layers(models["ours"]) for p in layer.experts.parameters(recurse=False)
    )
    result: dict[str, Any] = {
        "settings": vars(options),
        "expert_bytes": experts,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "machine": platform.processor() or platform.machine(),
        "sizes": [],
    }
    print(f"experts: {format_bytes(experts)} of {options.dtype}\n")
    print("| tokens per step | contestant | s/step (median, range) | saved for backward |")
    print("|---:|---|---:|---:|")
    for tokens in options.tokens:
        ids = torch.randint(
            1, 512, (max(1, tokens // 64), min(tokens, 64)), generator=torch.Generator().manual_seed(2)
        )
        equal = differences(models, pairs, ids)
        if options.dtype == "float32":
            assert max(equal.values()) < 1e-5, equal
        saved = {name: saved_bytes(model, ids) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for number in range(options.rounds + 1):
            for name, model in models.items():
                started = time.perf_counter()
                loss_of(model, ids).backward()
                optimizers[name].step()
                model.zero_grad()
                if number:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
        for name in models:
            middle, low, high = statistics.median(seconds[name]), min(seconds[name]), max(seconds[name])
            print(
                f"| {tokens} | {name} | {middle:.3f} ({low:.3f} to {high:.3f}) | {format_bytes(saved[name])} |"
            )
        rival = min(set(models) - {"ours"}, key=lambda name: statistics.median(seconds[name]))
        ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds[rival], strict=True)]
        size = {
            "tokens": tokens,
            "seconds": seconds,
            "saved_bytes": saved,
            "rival": rival,
            "speed": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
            "saved": saved["ours"] / saved[rival],
            "difference": equal,
        }
        result["sizes"].append(size)
    print()
    for size in result["sizes"]:
        speed = size["speed"]
        print(
            f"{size['tokens']} tokens: {speed['median']:.2f} times as fast as {size['rival']} ({speed['low']:.2f} to "
            f"{speed['high']:.2f}), {size['saved']:.3f} of what it saves; logits differ by "
            f"{size['difference']['logits']:.1e}, gradients by {size['difference']['gradients']:.1e}"
        )
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
