"""Tiny random checkpoints of every family that is tested, as from_pretrained finds them on disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from melinoe.experts.forward import use
from melinoe.routing.policies import DecayedCounts
from melinoe.runtime.load import align

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
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_GROUPS = {"n_group": 2, "topk_group": 1}
_HEADS = {"head_dim": 16}
_INNER = {"moe_intermediate_size": 16}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
_DBRX_COMMON = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")
_MAMBA = {"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8}

# {family: (config class, fields beside COMMON)}; 8 experts, 2 per token unless said otherwise
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "sliding_window": None}),
    "olmoe": ("OlmoeConfig", {"num_experts": 8}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 8}),
    "qwen2_moe": ("Qwen2MoeConfig", {"num_experts": 8, "shared_expert_intermediate_size": 16, **_INNER}),
    # the first layer is dense
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 8, "mlp_only_layers": [0], "norm_topk_prob": True, **_INNER, **_HEADS},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {"num_experts": 8, "shared_expert_intermediate_size": 16,
         "layer_types": ["linear_attention", "full_attention"], **_INNER, **_HEADS, **_LINEAR},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {"n_routed_experts": 8, "topk_method": "group_limited_greedy", "n_shared_experts": 1, **_GROUPS,
         **_INNER, **_LATENT},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {"n_routed_experts": 8, "first_k_dense_replace": 1, "n_shared_experts": 1, **_GROUPS, **_INNER,
         **_LATENT},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 8, "layer_types": ["full_attention"] * 2, "sliding_window": 64, **_HEADS},
    ),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 8}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {"n_routed_experts": 8, "first_k_dense_replace": 0, "n_shared_experts": 1, **_GROUPS, **_INNER,
         **_HEADS},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0, **_INNER},
    ),
    "minimax_m2": ("MiniMaxM2Config", {"num_local_experts": 8, **_HEADS}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {"num_experts": 8, "num_dense_layers": 0, "layer_types": ["conv", "full_attention"], **_INNER},
    ),
    "jamba": (
        "JambaConfig",
        {"num_experts": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1,
         "expert_layer_offset": 0, "mamba_d_state": 4, "use_mamba_kernels": False},
    ),
    "dots1": (
        "Dots1Config",
        {"n_routed_experts": 8, "n_shared_experts": 1, "norm_topk_prob": True, **_GROUPS, **_INNER, **_HEADS},
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {"num_experts": 8, "moe_topk": 2, **_HEADS}),
    "flex_olmo": ("FlexOlmoConfig", {"num_experts": 8}),
    "afmoe": (
        "AfmoeConfig",
        {"num_experts": 8, "num_dense_layers": 0, "num_shared_experts": 1,
         "layer_types": ["full_attention"] * 2, **_INNER, **_HEADS},
    ),
    # the experts have no gate
    "nemotron_h": (
        "NemotronHConfig",
        {"n_routed_experts": 8, "layers_block_type": ["mamba", "moe", "attention", "moe"],
         "moe_shared_expert_intermediate_size": 16, "use_mamba_kernels": False, **_INNER, **_HEADS, **_MAMBA},
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {"num_experts": 8, "top_k_experts": 2, "enable_moe_block": True, "vocab_size_per_layer_input": 64,
         "hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"],
         "sliding_window": 64, "global_head_dim": 16, **_INNER, **_HEADS},
    ),
    # not decorated: melinoe.models.undecorated; the first layer is dense, the weights of two experts scale
    # the inputs
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 8, "intermediate_size_mlp": 24, "moe_layers": [1, 2], "num_hidden_layers": 3,
         "no_rope_layers": [1, 0, 1], "attention_chunk_size": 8, **_HEADS},
    ),
    "dbrx": (
        "DbrxConfig",
        {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128,
         "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
         "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2}},
    ),
}  # fmt: skip
FAMILIES = tuple(CONFIGS)
# how routers score, where it is not by softmax (phimoe's sparsemixer is a softmax over what its mask leaves)
SCORE_KINDS = {"gemma4": "probability"} | dict.fromkeys(
    ("deepseek_v3", "glm4_moe", "minimax_m2", "lfm2_moe", "dots1", "afmoe", "nemotron_h", "llama4"), "sigmoid"
)
UNDECORATED = ("llama4", "dbrx")  # transformers knows one way to compute their experts


class RandomPolicy(DecayedCounts):
    """Keeps whatever chance says: a policy must not be able to change a result."""

    name = "random"

    def __init__(self, *args):
        self.generator = np.random.default_rng(1)
        super().__init__(*args)

    def worth(self, layer):
        return self.generator.random(self.num_experts).tolist()


def config(family: str) -> Any:
    """A config of a few thousand parameters with 8 experts."""
    name, fields = CONFIGS[family]
    theirs = getattr(transformers, name)
    common = COMMON if family != "dbrx" else {key: COMMON[key] for key in _DBRX_COMMON}
    return theirs(**{**common, **fields})


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
        if "correction" in name or "expert_bias" in name:
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


# {way to generate: settings of model.generate}; "assisted" and "generate_batch" are more than settings
WAYS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "one prompt": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
    "chunked prefill": {"prefill_chunk_size": 4},
    "generate_batch": {},
}
_ALONE = ("one prompt", "prompt lookup", "assisted")  # transformers guesses for one sequence at a time
NEW_TOKENS = 8


def generate(model: Any, way: str, assistant: Any = None) -> list[list[int]]:
    """Greedy token ids, prompt left out, by one of WAYS.

    There are two prompts of different length where it takes two.
    """
    inputs = batch()
    if way == "generate_batch":
        prompts = [
            row[mask.bool()].tolist()
            for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        settings = GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=63, pad_token_id=0
        )
        pages = ContinuousBatchingConfig(
            page_size=16, num_blocks=16, max_batch_tokens=64, use_cuda_graph=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = model.generate_batch(
                prompts, generation_config=settings, continuous_batching_config=pages
            )
        tokens = [results[key].generated_tokens for key in sorted(results)]
        errors = [results[key].error for key in sorted(results) if results[key].error]
        if errors or len(tokens) != len(prompts):
            raise NotImplementedError(errors[0] if errors else "no result")
        return tokens
    if way in _ALONE:
        inputs = {name: value[:1] for name, value in inputs.items()}
    more = {"assistant_model": assistant} if way == "assisted" else WAYS[way]
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    with torch.no_grad():
        tokens = model.generate(**inputs, **length, do_sample=False, **more)
    return tokens[:, inputs["input_ids"].shape[1] :].tolist()


def resident(source: Path, use_own: bool = True) -> Any:
    """The checkpoint with every expert in memory; `use_own`: on our experts function, to compare bits."""
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    if use_own:
        use(model)
        # as melinoe.load leaves them: torch and MKL round by alignment and by requires_grad
        model.requires_grad_(False)
        align(model)
    return model
