"""llama4: the weight of an expert multiplies its INPUT, before a gate that is not linear.

So this is not the same as multiplying its output. Its modelling computes every expert for every token, those
that were not chosen on an input of zeros; we compute the chosen ones alone.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn


def experts_facts(experts: Any) -> dict[str, Any]:
    """The facts of Llama4TextExperts: its weights are gate_up_proj [E, H, 2F] and down_proj [E, F, H]."""
    return {
        "has_gate": True,
        "has_bias": False,
        "has_post_expert_norm": False,
        "is_transposed": True,
        "is_concatenated": True,
        "_apply_gate": MethodType(_gate_first_half, experts),
        "weights_scale_input": True,
    }


def _gate_first_half(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * self.act_fn(gate)


def moe_forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama4TextMoe.forward with only the chosen experts: (output [T, H], router logits [T, E])."""
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden_states)
    indices = _chosen(self.router, logits)
    routed = self.melinoe_function(self.experts, hidden_states, indices, scores.gather(1, indices))
    return self.shared_expert(hidden_states) + routed, logits


def routing_of(router: nn.Module, output: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Llama4Router returns (scores [T, E], 0 where an expert was not chosen; logits [T, E])."""
    scores, logits = output
    indices = _chosen(router, logits.detach())
    return logits, scores.detach().gather(1, indices), indices


def _chosen(router: Any, logits: torch.Tensor) -> torch.Tensor:
    return torch.topk(logits, router.top_k, dim=1).indices
