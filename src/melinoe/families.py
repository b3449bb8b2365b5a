"""Two families that are not on transformers' ExpertsInterface, dressed so that everything here takes them.

transformers decorates 65 experts classes (moe.py finds those); llama4 and dbrx have experts classes of their
own. For each there is one function below that replaces, on the modules of one model, what differs:

    the router   returns (logits, weights [T, K], indices [T, K]), logits where transformers records them;
    the experts  are called with (hidden states, indices, weights), carry the decorator's attributes and ask
                 the ExpertsInterface, so that `set_experts_implementation` works on them.

Names and shapes of parameters stay, so checkpoints load and save as ever. Only the instance is changed (bound
methods, which deepcopy takes along), never a class.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    grouped_mm_experts_forward,
)


def _decorate(experts: Any, config: Any, is_transposed: bool) -> None:
    """What `use_experts_implementation` would have put on a gated experts module without biases."""
    experts.config, experts.is_transposed = config, is_transposed
    experts.has_gate, experts.is_concatenated = True, True
    experts.has_bias = experts.has_post_expert_norm = experts._is_expert_parallel = False


def _llama4(block: Any, config: Any) -> None:
    """Llama4TextMoe: a dense product over all experts, and the score multiplies the expert's input."""
    _decorate(block.experts, config, is_transposed=True)
    block.experts._apply_gate = MethodType(_default_apply_gate, block.experts)
    block.experts.forward = MethodType(_llama4_experts, block.experts)
    block.router.forward = MethodType(_llama4_router, block.router)
    block.forward = MethodType(_llama4_block, block)


def _llama4_router(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores, logits = type(self).forward(self, hidden)
    indices = torch.topk(logits, self.top_k, dim=1).indices
    return scores.gather(1, indices), logits, indices  # transformers records logits at 1


def _llama4_block(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = hidden.reshape(-1, self.hidden_dim)
    weights, logits, indices = self.router(hidden)
    return self.shared_expert(hidden) + self.experts(hidden, indices, weights), logits


def _llama4_experts(
    self: Any, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Each (token, choice) becomes a row that is weighted before it goes in; weight 1 on the way out.

    With one expert per token, as in every published llama4, rows are tokens.
    """
    tokens, top_k = indices.shape
    rows = hidden.repeat_interleave(top_k, 0) * weights.reshape(-1, 1)
    function = ALL_EXPERTS_FUNCTIONS.get_interface(
        self.config._experts_implementation, grouped_mm_experts_forward
    )
    out = function(self, rows, indices.reshape(-1, 1), torch.ones_like(weights).reshape(-1, 1))
    return out.view(tokens, top_k, -1).sum(1)


def _dbrx(block: Any, config: Any) -> None:
    """DbrxFFN: parameters w1, v1, w2 [E * F, H] one level down, no fused gate; the router gives logits only."""
    mlp, router = block.experts.mlp, block.router
    _decorate(mlp, config, is_transposed=False)
    mlp.num_experts = mlp.moe_num_experts
    mlp.expert_output = MethodType(_dbrx_expert, mlp)
    block.experts.forward = MethodType(_dbrx_experts, block.experts)
    router.top_k, router.moe_normalize_expert_weights = block.top_k, block.moe_normalize_expert_weights
    router.route = MethodType(type(block).route_tokens_to_experts, router)
    router.forward = MethodType(_dbrx_router, router)
    block.forward = MethodType(_dbrx_block, block)


def _dbrx_router(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = type(self).forward(self, hidden)
    weights, indices = self.route(logits)
    return logits, weights, indices


def _dbrx_block(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    _, weights, indices = self.router(hidden)
    return self.experts(hidden, indices, weights)


def _dbrx_experts(
    self: Any, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Stock functions know nothing of w1, v1 and w2: only "melinoe" runs here, all others are dbrx's own loop."""
    if self.mlp.config._experts_implementation != "melinoe":
        return type(self).forward(self, hidden, indices, weights)
    function = ALL_EXPERTS_FUNCTIONS["melinoe"]
    return function(self.mlp, hidden.reshape(-1, self.hidden_size), indices, weights).view_as(hidden)


def _dbrx_expert(self: Any, rows: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """One expert on its rows, [N, H] -> [N, H]; weights w1, v1, w2: [F, H]."""
    return type(self).forward(self, rows, weights["w1"], weights["v1"], weights["w2"])


# {class of the mixture block: what dresses it}
ADAPTED = {"Llama4TextMoe": _llama4, "DbrxFFN": _dbrx}


def adapt(model: nn.Module) -> None:
    """Dresses the mixture blocks of a llama4 or dbrx model, on the meta device or with weights.

    A second call changes nothing; a model of any other family is left alone.
    """
    configs = {  # the innermost model that holds a block comes last
        block: owner.config
        for owner in model.modules()
        if hasattr(owner, "_can_set_experts_implementation")
        for block in owner.modules()
        if type(block).__name__ in ADAPTED
    }
    for block, config in configs.items():
        if not hasattr(block, "melinoe_adapted"):
            ADAPTED[type(block).__name__](block, config)
            block.melinoe_adapted = True  # type: ignore[assignment]
    for owner in model.modules() if configs else ():
        if hasattr(owner, "_can_set_experts_implementation"):  # transformers looks for its decorator's name
            owner._can_set_experts_implementation = _yes  # type: ignore[assignment]


def _yes() -> bool:
    return True
