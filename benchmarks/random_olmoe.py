"""OLMoE checkpoints of random weights: real shapes and sizes without a download.

Routing of random weights is even, so hits are the worst that a model can have; quality means nothing.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import OlmoeConfig

from melinoe.files import whole_file

# of OLMoE-1B-7B
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, HEADS, VOCABULARY = 2048, 1024, 64, 8, 16, 50304


def small_config(hidden: int, inner: int, experts: int, layers: int, top_k: int, **more: Any) -> OlmoeConfig:
    """A configuration of any shape; `more`: other fields."""
    heads = max(1, hidden // 64)
    return OlmoeConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_experts=experts,
        num_experts_per_tok=top_k,
        **more,
    )


def layer_tensors(layer: int, generator: torch.Generator, added: float = 1.0) -> dict[str, torch.Tensor]:
    """One decoder layer under the hub's names; scales as a trained model has them, roughly.

    Args:
        added: scale of what attention and experts add to the residual stream.
    """

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        weight = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
        return weight.normal_(std=scale * shape[-1] ** -0.5, generator=generator).cpu()

    prefix = f"model.layers.{layer}"
    ones = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    tensors = {f"{prefix}.{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in ones}
    for name in "qkvo":
        scale = added if name == "o" else 1.0
        tensors[f"{prefix}.self_attn.{name}_proj.weight"] = random(HIDDEN, HIDDEN, scale=scale)
    tensors[f"{prefix}.mlp.gate.weight"] = random(EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        for name in ("gate_proj", "up_proj"):
            tensors[f"{prefix}.mlp.experts.{expert}.{name}.weight"] = random(INTERMEDIATE, HIDDEN)
        tensors[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = random(HIDDEN, INTERMEDIATE, scale=added)
    return tensors


def _other_tensors(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Embeddings, output layer and the last norm."""

    def random() -> torch.Tensor:
        weight = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device=generator.device)
        return weight.normal_(std=0.02, generator=generator).cpu()

    return {
        "model.embed_tokens.weight": random(),
        "lm_head.weight": random(),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }


def write_tokenizer(folder: Path) -> None:
    """One word for every id, so that texts are equal exactly where tokens are.

    Special tokens are found inside of words, too, so none may be the beginning of one.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {0: "<pad>", 2: "<eos>"}
    ids = {special.get(token, f"w{token}"): token for token in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)


def write_olmoe(folder: Path, num_layers: int, context: int = 4096, device: str = "cpu") -> int:
    """Writes a checkpoint of OLMoE-1B-7B's shape, one shard for each layer, 0.8 GB in bfloat16.

    Shards that are there already are used again.

    Args:
        context: tokens that the config allows; the weights do not depend on it.
        device: what draws the numbers: a GPU is quicker, and draws others.

    Returns:
        The bytes of all shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, num_layers, context)
    write_tokenizer(folder)
    for layer in range(num_layers + 1):
        shard = shard_of(folder, layer, num_layers + 1)
        if not shard.exists():
            generator = torch.Generator(device).manual_seed(layer)
            tensors = layer_tensors(layer, generator) if layer < num_layers else _other_tensors(generator)
            write_shard(shard, tensors)
            del tensors
            gc.collect()
    return write_index(folder)


def write_config(folder: Path, num_layers: int, context: int = 4096) -> None:
    """OLMoE-1B-7B's, but for the number of layers and of tokens."""
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["OlmoeForCausalLM"],
        eos_token_id=2,
        pad_token_id=0,
    )
    config.save_pretrained(folder)


def shard_of(folder: Path, number: int, of: int) -> Path:
    """Where the hub's naming puts a shard; they are counted from 0 here."""
    return folder / f"model-{number + 1:05d}-of-{of:05d}.safetensors"


def write_shard(shard: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a shard, whole or not at all."""
    with whole_file(shard) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    print(f"wrote {shard.name}", flush=True)


def write_index(folder: Path) -> int:
    """Writes the index of a folder's shards.

    Returns:
        The bytes of all shards.
    """
    names: dict[str, str] = {}
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            names |= dict.fromkeys(opened.keys(), shard.name)
    total = sum(shard.stat().st_size for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
