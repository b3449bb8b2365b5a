"""The caches that the loss can be taken against: the runtime's policy, LRU, what the last token asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from melinoe.losses.cache_loss import simulated_misses, soft_cache_misses
from melinoe.losses.occupancy import CACHES, occupancy, policy_counts, resident_by_counts
from melinoe.models.router_tap import requests
from melinoe.routing.policies import DecayedCounts, decode_call
from melinoe.routing.simulate import simulate
from melinoe.routing.trace import from_sequences


def local_indices(sequences, size, num_experts, top_k, seed=0):
    """[B, S, K] requests that repeat: each sequence likes some experts, each token follows the one before."""
    generator = torch.Generator().manual_seed(seed)
    taste = 1.5 * torch.randn(sequences, 1, num_experts, generator=generator, dtype=torch.float64)
    noise = torch.randn(sequences, size, num_experts, generator=generator, dtype=torch.float64)
    for token in range(1, size):
        noise[:, token] = 0.7 * noise[:, token - 1] + 0.7 * noise[:, token]
    return (taste + noise).topk(top_k).indices


def test_counts_are_those_of_the_runtime_policy():
    indices = local_indices(1, 50, 8, 2)[0]
    policy = DecayedCounts(1, 8, 4)
    policy.begin()
    worth = [policy.worth(0)]
    for token in indices:
        policy.request(0, decode_call(token.numpy()[None]))
        worth.append(policy.worth(0))
    ours = policy_counts(requests(indices, 8).double()[None], chunk=16)[0]
    np.testing.assert_allclose(ours.numpy(), np.array(worth)[:-1], rtol=1e-9)


def test_simulated_misses_are_those_of_the_simulator():
    indices, prompt, size = local_indices(20, 80, 16, 4), 30, 80
    rows = [indices[row].numpy()[:, None].astype(np.int16) for row in range(len(indices))]
    trace = from_sequences(
        rows, [[0] * (size + 1)] * len(rows), [prompt] * len(rows), num_experts=16, fingerprint="0" * 16
    )
    simulated = simulate(trace, "decay", 6)["results"][0]["loads_per_token"]
    scored = torch.zeros(len(rows), size, dtype=torch.bool)
    scored[:, prompt:] = True
    hot = requests(indices, 16).double()[None]
    ours = float(simulated_misses(hot, torch.ones(len(rows), size), scored, 6)[0])
    assert ours == pytest.approx(simulated, rel=0.03)
    assert 0.5 < ours < 3.5  # neither all nor nothing, else the agreement is worth nothing


def test_who_is_resident_by_hand():
    # E = 4, K = 1, C = 2; requests 0, 0, 1, 2: before the last token, 0 and 1 have counts and 2, 3 none
    hot = requests(torch.tensor([[[0], [0], [1], [2]]]), 4).double()
    held = resident_by_counts(hot, 2)
    assert held[0, 0].tolist() == [0, 0, 0, 0]  # an empty cache
    assert held[0, 3].tolist() == [1, 1, 0, 0]
    assert resident_by_counts(hot, 4).min() == 1


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_lru_occupancy_fills_the_slots_and_orders_by_rate(gamma):
    hot = requests(local_indices(2, 60, 12, 3), 12).double()
    held = occupancy(hot, "lru", 5, gamma, 3, chunk=16)
    assert held.sum(-1).sub(5).abs().max() < 1e-4
    assert held.min() >= 0 and held.max() <= 1
    even = occupancy(torch.ones(1, 4, 12, dtype=torch.float64), "lru", 3, gamma, 12)
    torch.testing.assert_close(even, torch.full_like(even, 3 / 12))


def test_lru_occupancy_by_hand():
    # two experts with rates a and a/2 share one slot: 1 - x^2 + 1 - x = 1 with x = exp(-a T / 2), so x is
    # 0.618...; 1e6, so that the thin even rate is nothing
    hot = torch.tensor([[[1.0, 0.5], [0, 0]]], dtype=torch.float64) * 1e6
    held = occupancy(hot, "lru", 1, 0.9, 1)[0, 1]
    golden = (5**0.5 - 1) / 2
    torch.testing.assert_close(held, torch.tensor([1 - golden**2, 1 - golden], dtype=torch.float64))


def test_previous_is_the_token_before():
    hot = requests(torch.tensor([[[0, 1], [1, 2], [2, 3]]]), 4).double()
    held = occupancy(hot, "previous", 2, 0.9, 2)
    torch.testing.assert_close(held[0], torch.stack([torch.zeros(4).double(), hot[0, 0], hot[0, 1]]))


@pytest.mark.parametrize("cache", ["lru", "counts"])
def test_gradient_by_finite_differences(cache, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    r = torch.rand(2, 6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    if cache == "counts":  # the width is held fixed in the backward pass, so it must be in the forward one
        monkeypatch.setattr(torch.Tensor, "std", lambda self, *_, **__: self.detach()[..., :1] * 0 + 0.5)
    torch.autograd.gradcheck(lambda x: occupancy(x, cache, 2, 0.8, 2, chunk=4), (r,), eps=1e-6, atol=1e-4)


@pytest.mark.parametrize("cache", CACHES)
def test_a_sequence_that_keeps_to_its_experts_costs_less(cache):
    size, mask = 40, torch.ones(1, 40)
    scored = torch.arange(size)[None] >= 20
    same = requests(torch.arange(4).expand(1, size, 4), 16).double()[None]
    spread = requests(local_indices(1, size, 16, 4, seed=5), 16).double()[None]
    losses = [float(soft_cache_misses(x, mask, scored, 6, 4, cache=cache)) for x in (same, spread)]
    assert losses[0] < 0.5 * losses[1]
    full = float(soft_cache_misses(spread, mask, scored, 16, 4, gamma=1.0, cache=cache))
    if cache in ("lru", "counts"):  # nothing is missed where everything has a slot
        assert full == 0.0
