"""A checkpoint of OLMoE-1B-7B's real shape under a memory limit smaller than a third of it.

    python benchmarks/larger_than_memory.py --folder /big/disk --output result.json

Writes 13.8 GB of random bfloat16 weights under the hub's names (one safetensors shard per layer, kept and reused),
then, each in a process of its own inside a memory cgroup of 4 GiB in which the page cache counts as well:

    in place    melinoe generate --model CHECKPOINT: indexed on first use, no second copy
    convert     melinoe convert CHECKPOINT STORE
    store       melinoe generate --model STORE, in turn with in place, and once with a smaller budget

All must generate the same text. For each: seconds, the largest resident set of the process, and the largest use of
the cgroup. Random weights say nothing of quality, nor of the hit rate that a trained model would have.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from melinoe.config import parse_bytes
from melinoe.demonstration.limited_process import MemoryLimit
from melinoe.demonstration.race import drop_page_cache
from melinoe.files import whole_file

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


def write_tokenizer(folder: Path) -> None:
    """One word for every id, so that texts are equal exactly where tokens are."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(folder)


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
    write_tokenizer(folder)
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
            with whole_file(shard) as partial:
                save_file(tensors, partial, metadata={"format": "pt"})
            print(f"wrote {shard.name}", flush=True)
            del tensors
            gc.collect()
        with safe_open(shard, "pt") as opened:
            names |= dict.fromkeys(opened.keys(), shard.name)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def limited(limit: MemoryLimit, name: str, folder: Path, arguments: list[str]) -> dict:
    """Runs one verb inside the limit, page cache dropped; its last line of JSON, with seconds and peak bytes."""
    drop_page_cache(folder)  # what this process has written would be read without being charged to the limit
    if limit.available:
        limit.peak_bytes()
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "melinoe", *arguments, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MELINOE_HOME": str(folder / "home")},
        preexec_fn=limit.join if limit.available else None,
    )
    output, _ = process.communicate()
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{name} failed with exit code {process.returncode} (-9: killed, out of memory)")
    found = json.loads(output.strip().splitlines()[-1])
    peak = limit.peak_bytes() if limit.available else None
    print(f"{name}: {seconds:.1f} s, cgroup at most {peak} bytes, {json.dumps(found)[-420:]}", flush=True)
    return {"seconds": seconds, "cgroup_peak_bytes": peak, "output": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True, help="a folder on a disk with 30 GB free")
    parser.add_argument("--layers", type=int, default=16, help="fewer for a quick look")
    parser.add_argument("--limit", default="4GiB", help="of the cgroup")
    parser.add_argument("--memory", default="3GiB", help="melinoe's budget inside it")
    parser.add_argument("--less-memory", default="2GiB", help="of the last run")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2, help="of store and in place in turn")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and store there")
    parser.add_argument("--output")
    options = parser.parse_args()
    folder = Path(options.folder)
    source, store = folder / f"olmoe-shape-{options.layers}", folder / f"olmoe-shape-{options.layers}-store"
    began = time.perf_counter()
    total = write_checkpoint(source, options.layers)
    print(f"checkpoint: {total} bytes, {time.perf_counter() - began:.0f} s", flush=True)
    shutil.rmtree(store, ignore_errors=True)
    shutil.rmtree(folder / "home", ignore_errors=True)
    limit = MemoryLimit(parse_bytes(options.limit))
    if not limit.available:
        print("no memory cgroup can be made here: running without a limit", file=sys.stderr)
    prompt = " ".join(f"w{100 + 37 * word}" for word in range(16))
    runs = {
        "in place, first use": (source, options.memory),
        "convert": None,
        **{
            f"{name}, {turn}": (folder, options.memory)
            for turn in range(1, options.rounds + 1)
            for name, folder in (("store", store), ("in place", source))
        },
        "store, less memory": (store, options.less_memory),
    }
    result: dict = {"settings": vars(options), "checkpoint_bytes": total, "limit_applied": limit.available}
    try:
        for name, run in runs.items():
            if run is None:
                arguments = ["convert", str(source), str(store), "--quiet"]
            else:
                model, memory = run
                arguments = ["generate", "-p", prompt, "--raw", "--model", str(model), "--memory", memory]
                arguments += ["--max-new-tokens", str(options.tokens)]
            result[name] = limited(limit, name, folder, arguments)
    finally:
        limit.close()
    texts = {name: result[name]["output"]["text"] for name, run in runs.items() if run is not None}
    result["all_texts_equal"] = len(set(texts.values())) == 1
    print(f"all texts equal: {result['all_texts_equal']}")
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1))
    if not options.keep:
        shutil.rmtree(source)
        shutil.rmtree(store)
        shutil.rmtree(folder / "home")


if __name__ == "__main__":
    main()
