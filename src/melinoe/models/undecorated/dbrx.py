"""dbrx: all experts of a layer are rows of three flat [E * F, H] matrices.

One expert is computed by the forward of `DbrxExpertGLU`, which takes its rows of the matrices.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch


def experts_facts(experts: Any) -> dict[str, Any]:
    """The facts of DbrxExpertGLU: its weights are w1, v1 and w2, each [E * F, H]."""
    return {
        "has_gate": True,
        "has_bias": False,
        "has_post_expert_norm": False,
        "is_transposed": False,
        "is_concatenated": False,
        "num_experts": experts.moe_num_experts,
        "expert_forward": MethodType(_expert_forward, experts),
    }


def _expert_forward(self: Any, rows: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """[N, H] -> [N, H] by DbrxExpertGLU's own forward; weights: w1, v1, w2, each [F, H]."""
    return type(self).forward(self, rows, weights["w1"], weights["v1"], weights["w2"])


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """DbrxExperts.forward: hidden states arrive as [B, S, H] and leave so."""
    flat = hidden_states.reshape(-1, self.hidden_size)
    return self.melinoe_function(self.mlp, flat, top_k_index, top_k_weights).view_as(hidden_states)


def routing_of(ffn: Any, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DbrxRouter returns logits [T, E]; the DbrxFFN around it chooses."""
    weights, indices = ffn.route_tokens_to_experts(output.detach())
    return output, weights, indices
