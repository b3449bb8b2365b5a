"""The trained mixture as a folder that transformers opens: Qwen2-MoE's class, which has shared experts.

Llama's attention is Qwen2-MoE's without biases. Its softmax weights sum to one and its shared expert counts
half (the sigmoid of a gate of zeros), so factors of 8 and 2, powers of two, go into the down projections.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mixture import Mixture
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM


@torch.no_grad()
def to_transformers(model: Any) -> Qwen2MoeForCausalLM:
    """A Llama model whose `mlp` are Mixtures, as Qwen2-MoE, in float32."""
    config, first = model.config, model.model.layers[0].mlp
    assert isinstance(first, Mixture)
    num_experts = len(first.router)
    size = (first.down.shape[1] - first.num_shared) // num_experts
    made = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=dict(config.rope_parameters),
            tie_word_embeddings=True,
            qkv_bias=False,
            num_experts=num_experts,
            num_experts_per_tok=first.num_chosen,
            norm_topk_prob=True,
            moe_intermediate_size=size,
            shared_expert_intermediate_size=first.num_shared,
            intermediate_size=size,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
    )
    kept = {name: tensor for name, tensor in model.state_dict().items() if ".mlp." not in name}
    for index, layer in enumerate(model.model.layers):
        mixture, place = layer.mlp, f"model.layers.{index}.mlp"
        gate, up = mixture.gate_up.chunk(2)
        shared, down = mixture.num_shared, mixture.down
        kept[f"{place}.gate.weight"] = mixture.router
        kept[f"{place}.shared_expert_gate.weight"] = torch.zeros(1, config.hidden_size)
        kept[f"{place}.shared_expert.gate_proj.weight"] = gate[:shared]
        kept[f"{place}.shared_expert.up_proj.weight"] = up[:shared]
        kept[f"{place}.shared_expert.down_proj.weight"] = down[:, :shared] * 2
        parts = [one[shared:].unflatten(0, (num_experts, size)) for one in (gate, up)]
        kept[f"{place}.experts.gate_up_proj"] = torch.cat(parts, dim=1)
        routed = down[:, shared:].unflatten(1, (num_experts, size)).transpose(0, 1)
        kept[f"{place}.experts.down_proj"] = routed * mixture.num_chosen
    made.load_state_dict(kept)
    made.generation_config = model.generation_config
    return made.eval()


def write_mixture(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes model and tokenizer in bfloat16."""
    to_transformers(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
