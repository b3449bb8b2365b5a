"""A checkpoint of OLMoE-1B-7B's real shape under a memory limit smaller than a third of it.

    python benchmarks/larger_than_memory.py --folder /big/disk --output result.json

Writes 13.8 GB of random bfloat16 weights under the hub's names (one safetensors shard per layer, kept and reused),
then runs `melinoe convert` and `melinoe generate` in a memory cgroup of 4 GiB, in which the page cache counts as
well, and says how long each took and how much memory it had at its peak. Random weights say nothing of quality
and their router asks for experts evenly: the hit rate is the worst a model can have.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from melinoe.bench.measure import MemoryLimit
from melinoe.config import parse_bytes
from melinoe.tiny import model_path

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, HEADS, VOCABULARY = 2048, 1024, 64, 8, 16, 50304


def layer_tensors(layer: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One decoder layer under the hub's names; scales as a trained model has them, roughly."""

    def random(*shape: int) -> torch.Tensor:
        weight = torch.empty(shape, dtype=torch.bfloat16)
        return weight.normal_(std=shape[-1] ** -0.5, generator=generator)

    prefix = f"model.layers.{layer}"
    ones = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    tensors = {f"{prefix}.{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in ones}
    for name in "qkvo":
        tensors[f"{prefix}.self_attn.{name}_proj.weight"] = random(HIDDEN, HIDDEN)
    tensors[f"{prefix}.mlp.gate.weight"] = random(EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        for name in ("gate_proj", "up_proj"):
            tensors[f"{prefix}.mlp.experts.{expert}.{name}.weight"] = random(INTERMEDIATE, HIDDEN)
        tensors[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = random(HIDDEN, INTERMEDIATE)
    return tensors


def write_checkpoint(folder: Path, num_layers: int) -> int:
    """Writes what is missing and returns the bytes of all shards."""
    from transformers import OlmoeConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = OlmoeConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=num_layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16", architectures=["OlmoeForCausalLM"],
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_path() / name, folder / name)  # some tokenizer: text does not matter here
    names: dict[str, str] = {}
    for layer in range(num_layers + 1):
        shard = folder / f"model-{layer + 1:05d}-of-{num_layers + 1:05d}.safetensors"
        generator = torch.Generator().manual_seed(layer)
        if layer < num_layers:
            tensors = layer_tensors(layer, generator) if not shard.exists() else None
        else:
            tensors = {
                f"{name}.weight": torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16).normal_(
                    std=0.02, generator=generator
                )
                for name in ("model.embed_tokens", "lm_head")
            } | {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
        if tensors is not None:
            partial = shard.with_suffix(".partial")
            save_file(tensors, partial, metadata={"format": "pt"})
            partial.rename(shard)
            print(f"wrote {shard.name}", flush=True)
        from safetensors import safe_open

        with safe_open(shard, "pt") as opened:
            names |= dict.fromkeys(opened.keys(), shard.name)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def limited(limit: MemoryLimit, name: str, arguments: list[str]) -> dict:
    """Runs one verb inside the limit; its last line of JSON, with seconds and peak bytes."""
    if limit.available:
        limit.peak_bytes()
    began = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "melinoe", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=limit.join if limit.available else None,
        check=False,
    )
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{name} failed with exit code {process.returncode} (-9: killed, out of memory)")
    lines = process.stdout.strip().splitlines()
    found = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    peak = limit.peak_bytes() if limit.available else None
    print(f"{name}: {seconds:.1f} s, peak {peak} bytes {json.dumps(found)[:400]}", flush=True)
    return {"seconds": seconds, "peak_bytes_with_page_cache": peak, "output": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True, help="a folder on a disk with 30 GB free")
    parser.add_argument("--layers", type=int, default=16, help="fewer for a quick look")
    parser.add_argument("--limit", default="4GiB", help="of the cgroup")
    parser.add_argument("--memory", default="3GiB", help="melinoe's budget inside it")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and store there")
    parser.add_argument("--output")
    options = parser.parse_args()
    folder = Path(options.folder)
    source, store = folder / f"olmoe-shape-{options.layers}", folder / f"olmoe-shape-{options.layers}-store"
    began = time.perf_counter()
    total = write_checkpoint(source, options.layers)
    print(f"checkpoint: {total} bytes, {time.perf_counter() - began:.0f} s", flush=True)
    shutil.rmtree(store, ignore_errors=True)
    limit = MemoryLimit(parse_bytes(options.limit))
    if not limit.available:
        print("no memory cgroup can be made here: running without a limit", file=sys.stderr)
    prompt = "sort 31,5,18,2"
    generate = [
        "generate",
        "-p",
        prompt,
        "--memory",
        options.memory,
        "--max-new-tokens",
        str(options.tokens),
        "--json",
    ]
    result = {"settings": vars(options), "checkpoint_bytes": total, "limit_applied": limit.available}
    try:
        result["convert"] = limited(limit, "convert", ["convert", str(source), str(store), "--json"])
        result["generate"] = limited(limit, "generate from the store", [*generate, "--model", str(store)])
    finally:
        limit.close()
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1))
    if not options.keep:
        shutil.rmtree(source)
        shutil.rmtree(store)


if __name__ == "__main__":
    main()
