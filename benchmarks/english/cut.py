"""Cuts the feed-forward layers of a dense model into experts.

Neurons that are active for the same tokens belong together: balanced k-means over their activations. A
router is fitted by ridge regression of the logarithm of each expert's energy (the squared norm of what it
adds) on the layer's input.
"""

from __future__ import annotations

from typing import Any

import torch
from mixture import Mixture
from torch import Tensor
from torch.nn import functional

RIDGE, DIMENSIONS, ITERATIONS = 0.01, 128, 12
# the chosen experts count almost alike, as in the dense model: before training, NLL 5.8 instead of 9.1
STEEPNESS = 0.1


@torch.no_grad()
def cut(
    model: Any, batches: list[Tensor], num_experts: int, num_chosen: int, num_shared: int
) -> dict[str, Tensor]:
    """Replaces every `mlp` of a Llama model by a Mixture.

    Args:
        batches: token ids [1, S], of some 10,000 tokens together.
        num_shared: how many of the strongest neurons every token gets.

    Returns:
        What `cut_as` takes: order [L, I] int16, neurons as they stand now, and router [L, E, H].
    """
    layers, orders, routers = model.model.layers, [], []
    for layer, inputs in zip(layers, layer_inputs(model, batches), strict=True):
        mlp = layer.mlp
        gate, up, down = (one.weight for one in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        neurons = functional.silu(inputs @ gate.T) * (inputs @ up.T)
        strength = neurons * down.norm(dim=0)
        by_strength = strength.abs().mean(0).argsort(descending=True)
        shared, others = by_strength[:num_shared], by_strength[num_shared:].sort().values
        order = torch.cat([shared, others[divide(strength[:, others], num_experts)]])
        down, neurons = down[:, order], neurons[:, order]
        energy = torch.stack(
            [
                (part @ weight.T).square().sum(-1)
                for part, weight in zip(
                    neurons[:, num_shared:].chunk(num_experts, 1), down[:, num_shared:].chunk(num_experts, 1),
                    strict=True,
                )
            ],
            dim=1,
        )  # fmt: skip
        orders.append(order)
        routers.append(fit_router(inputs, energy.clamp_min(1e-9).log()) * STEEPNESS)
    found = {"order": torch.stack(orders).short(), "router": torch.stack(routers)}
    cut_as(model, found, num_chosen, num_shared)
    return found


@torch.no_grad()
def cut_as(model: Any, found: dict[str, Tensor], num_chosen: int, num_shared: int) -> None:
    """Cuts as it was cut before; `found` is what `cut` returned."""
    for layer, order, router in zip(model.model.layers, found["order"].long(), found["router"], strict=True):
        mlp = layer.mlp
        gate, up, down = (one.weight for one in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        layer.mlp = Mixture(gate[order], up[order], down[:, order], router, num_shared, num_chosen)


def cut_anywhere(model: Any, num_experts: int, num_chosen: int, num_shared: int) -> None:
    """The same modules without a thought for what is in them: a saved state goes there."""
    config, num_layers = model.config, len(model.model.layers)
    found = {
        "order": torch.arange(config.intermediate_size).expand(num_layers, -1),
        "router": torch.zeros(num_layers, num_experts, config.hidden_size),
    }
    cut_as(model, found, num_chosen, num_shared)


def layer_inputs(model: Any, batches: list[Tensor]) -> list[Tensor]:
    """What enters each feed-forward layer: [T, H] for each layer."""
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, -2)))
        for layer, kept in zip(model.model.layers, seen, strict=True)
    ]
    for batch in batches:
        model.model(batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept) for kept in seen]


def divide(strength: Tensor, num_experts: int) -> Tensor:
    """An order of neurons in which those of one expert stand side by side.

    Args:
        strength: [T, I]: how much each neuron adds for each token.
    """
    generator = torch.Generator().manual_seed(0)
    points = functional.normalize(strength.abs().sqrt(), dim=0)
    points = functional.normalize(points - points.mean(1, keepdim=True), dim=0).T  # [I, T]
    left, values, _ = torch.svd_lowrank(points, q=DIMENSIONS, niter=2)
    points = left * values
    size = len(points) // num_experts
    centres = points[torch.randperm(len(points), generator=generator)[:num_experts]]
    for _ in range(ITERATIONS):
        expert = balanced(torch.cdist(points, centres), size)
        centres = torch.stack([points[expert == e].mean(0) for e in range(num_experts)])
    return expert.argsort(stable=True)


def balanced(distance: Tensor, size: int) -> Tensor:
    """Each point's centre, `size` points for every centre: whoever loses most by waiting chooses first.

    Args:
        distance: [points, centres].
    """
    chosen = torch.full((len(distance),), -1)
    distance, free = distance.clone(), torch.arange(len(distance))
    room = torch.full((distance.shape[1],), size)
    while len(free):
        nearest = distance[free].topk(min(2, int((room > 0).sum())), largest=False)
        regret = nearest.values[:, -1] - nearest.values[:, 0]
        wish = nearest.indices[:, 0]
        for centre in wish.unique().tolist():
            who = (wish == centre).nonzero()[:, 0]
            who = who[regret[who].argsort(descending=True)][: int(room[centre])]
            chosen[free[who]] = centre
            room[centre] -= len(who)
        distance[:, room == 0] = float("inf")
        free = free[chosen[free] < 0]
    return chosen


def fit_router(inputs: Tensor, target: Tensor) -> Tensor:
    """[E, H]: ridge regression of target [T, E] on inputs [T, H]. What is the same for all experts is taken
    out first, as softmax does."""
    target = target - target.mean(1, keepdim=True)
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, inputs.T @ target).T.contiguous()
