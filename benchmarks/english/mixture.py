"""A feed-forward layer whose neurons are divided among experts, in the form that trains fast on a CPU.

All neurons are computed as one matrix product, and those of experts that were not chosen are multiplied by
zero. That is four times the arithmetic of the chosen experts and several times faster than 32 small products
per layer. `export.py` writes the same function as a class of transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Mixture(nn.Module):
    """Disjoint parts of one feed-forward layer, of which a router chooses a few for each token.

    Args:
        gate, up: [I, H]: first the neurons that every token gets, then those of each expert side by side.
        down: [H, I], in the same order. router: [E, H].
        num_shared: how many neurons every token gets; E divides the others.
        num_chosen: how many experts a token gets; their softmax weights sum to this.
    """

    def __init__(
        self, gate: Tensor, up: Tensor, down: Tensor, router: Tensor, num_shared: int, num_chosen: int
    ) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.cat([gate, up]))
        self.down = nn.Parameter(down.clone())
        self.router = nn.Parameter(router.clone())
        self.num_shared, self.num_chosen = num_shared, num_chosen
        self.balance: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        x = hidden.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            probabilities = (x.float() @ self.router.T).softmax(-1)
        weights, chosen = probabilities.topk(self.num_chosen, dim=-1)
        weights = weights * (self.num_chosen / weights.sum(-1, keepdim=True))
        mask = torch.zeros_like(probabilities).scatter(-1, chosen, weights)
        if self.training:
            used = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0).mean(0) / self.num_chosen
            self.balance = len(used) * (used * probabilities.mean(0)).sum()
        gate, up = functional.linear(x, self.gate_up).chunk(2, dim=-1)
        neurons = functional.silu(gate) * up
        size = (neurons.shape[-1] - self.num_shared) // len(self.router)
        routed = neurons[:, self.num_shared :].unflatten(-1, (-1, size))
        routed = (routed * mask.to(routed.dtype).unsqueeze(-1)).flatten(-2)
        neurons = torch.cat([neurons[:, : self.num_shared], routed], dim=-1) if self.num_shared else routed
        return functional.linear(neurons, self.down).view(hidden.shape)
