"""Every model type of transformers that mixes experts, and a tiny config of it.

Both are derived from what the config classes declare.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from melinoe.models.supported import refusal

# {size that a config may declare: the tiny one}. What a config class declares of these is shrunk, so a model
# type that transformers gains has a tiny config before anybody has written an entry for it.
SIZES: dict[str, Any] = {
    # vocabulary, width and depth
    "vocab_size": 64,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layers": 2,
    "max_position_embeddings": 128,
    "max_seq_len": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.2,
    # attention
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_heads": 2,
    "head_dim": 16,
    "sliding_window": 64,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 64,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 64,
    "rel_extent": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    # layers that keep a state in place of keys and values
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    # the mixture: 8 experts, 2 per token
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 24,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "dense_intermediate_size": 24,
    "router_hidden_size": 16,
    # what makes tokens of pictures and sounds, in the types that have a text part beside it
    "depth": 1,
    "num_heads": 2,
    "image_size": 28,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "out_hidden_size": 32,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "adapter_out_dim": 32,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "num_dense_layers": 0,
    "first_k_dense_replace": 1,
}
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
# {model type: what its tiny config has beside SIZES}; of a type with a text part: of that part
FIELDS: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": None},
    # the first layer is dense
    "qwen3_moe": {"mlp_only_layers": [0], "norm_topk_prob": True},
    "qwen3_next": _LINEAR_AND_FULL,
    "deepseek_v2": {"topk_method": "group_limited_greedy", "first_k_dense_replace": 0},
    "gpt_oss": {"layer_types": ["full_attention"] * 2},
    "glm4_moe": {"first_k_dense_replace": 0},
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "dots1": {"norm_topk_prob": True, "first_k_dense_replace": 0},
    "afmoe": {"layer_types": ["full_attention"] * 2},
    # the experts have no gate
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "use_mamba_kernels": False,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
        "n_group": 1,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 16,
    },
    # not decorated: melinoe.models.undecorated; the first layer is dense, the weights of two experts scale
    # the inputs
    "llama4_text": {
        "intermediate_size_mlp": 24,
        "moe_layers": [1, 2],
        "num_hidden_layers": 3,
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 8,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"]},
    "bailing_hybrid": _LINEAR_AND_FULL,
    "kimi_linear": _LINEAR_AND_FULL,
    "qwen3_5_moe_text": _LINEAR_AND_FULL,
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "ngram_vocab_size_base": 64,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 16,
    },
    # logits that are not scaled down, so that a few steps of tuning show
    "cohere2_moe": {"logit_scale": 1.0},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "beam": _SPARSE,
    "laguna": _SPARSE,
    "mimo_v2_flash": {"num_key_value_heads": 1, "layer_types": ["full_attention", "sliding_attention"]},
    # the first layer looks experts up by token
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "flint": {"mlp_only_layers": []},
    "zaya": {"num_experts_per_tok": 1},  # it allows no other
}


def _declared(config_class: type) -> set[str]:
    """The fields of a config class, without those that every config has."""
    names: set[str] = set()
    for base in config_class.__mro__:
        if base is not PreTrainedConfig and issubclass(base, PreTrainedConfig):
            names |= set(inspect.get_annotations(base))
    return names


def _parts(config_class: type) -> dict[str, type]:
    return getattr(config_class, "sub_configs", None) or {}


def _tiny_fields(config_class: Any) -> dict[str, Any]:
    names = _declared(config_class)
    fields = {name: size for name, size in SIZES.items() if name in names}
    fields |= FIELDS.get(config_class.model_type, {})
    for name, part in _parts(config_class).items():
        fields.setdefault(name, _tiny_fields(part))
    return fields


def config(family: str) -> Any:
    """A config of a few thousand parameters with 8 experts."""
    theirs = CONFIG_MAPPING[family]
    return theirs(**_tiny_fields(theirs))


@cache
def mixture_types() -> tuple[str, ...]:
    """Every model type of transformers whose config, or a part of it, has fields about experts."""

    def about_experts(config_class: type) -> bool:
        own = _declared(config_class) | set(getattr(config_class, "attribute_map", {}))
        return any(re.search("expert|moe", name) for name in own) or any(
            about_experts(part) for part in _parts(config_class).values()
        )

    return tuple(name for name in CONFIG_MAPPING_NAMES if about_experts(CONFIG_MAPPING[name]))


@cache
def exact_types() -> tuple[str, ...]:
    """Those of them that melinoe does not refuse: each must be exact, and stand in docs/families.md."""
    return tuple(name for name in mixture_types() if refusal(name) is None)


def refused_types() -> tuple[str, ...]:
    return tuple(name for name in mixture_types() if refusal(name) is not None)
