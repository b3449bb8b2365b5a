"""Tiny random checkpoints of several families, as from_pretrained finds them on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}


def config(family: str) -> Any:
    """A config of a few thousand parameters with 8 experts."""
    if family == "olmoe":
        return transformers.OlmoeConfig(**COMMON, num_experts=8)
    if family == "mixtral":
        return transformers.MixtralConfig(**COMMON, num_local_experts=8, sliding_window=None)
    if family == "qwen3_moe":  # the first layer is dense
        return transformers.Qwen3MoeConfig(
            **COMMON,
            num_experts=8,
            moe_intermediate_size=16,
            head_dim=16,
            mlp_only_layers=[0],
            norm_topk_prob=True,
        )
    if family == "gpt_oss":  # biases, transposed, interleaved gate
        return transformers.GptOssConfig(
            **COMMON, num_local_experts=8, head_dim=16, layer_types=["full_attention"] * 2, sliding_window=64
        )
    if family == "deepseek_v3":  # sigmoid scores, groups, correction bias, shared experts
        return transformers.DeepseekV3Config(
            **COMMON, n_routed_experts=8, n_group=2, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1,
            q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_shared_experts=1,
        )  # fmt: skip
    if family == "granitemoe":  # stored fused
        return transformers.GraniteMoeConfig(**COMMON, num_local_experts=8)
    raise AssertionError(family)


FAMILIES = ("olmoe", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe")


def save_tokenizer(folder: Path) -> None:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(50)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    ).save_pretrained(folder)


def save_checkpoint(folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Writes config, weights and tokenizer; returns the folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family), dtype=dtype)
    for name, parameter in model.named_parameters():  # correction biases and the like start at zero or empty
        if parameter.is_floating_point() and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    for name, buffer in model.named_buffers():
        if "correction" in name:
            buffer.normal_(std=0.05)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def batch(length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two prompts of different length, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, : length // 3] = 0
    ids[1, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask}
