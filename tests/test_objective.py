"""The two losses against answers worked by hand, slow loops, and finite differences."""

from __future__ import annotations

import pytest
import torch

from melinoe.losses.cache_loss import (
    boundary_surrogate,
    scored_positions,
    soft_cache_misses,
    straight_through_requests,
)
from melinoe.losses.occupancy import cache_states
from melinoe.losses.rank_matching import rank_matching
from melinoe.models.router_tap import requests

CLIP = {False: "plain", True: "clipped"}


def loop_misses(r_SE, scored_S, capacity, top_k, gamma, clipped=False):
    """Eq. 4 and 11 as written, one token at a time; returns (sum of misses, scored tokens, states)."""
    num_experts = r_SE.shape[-1]
    c = torch.full((num_experts,), capacity / num_experts, dtype=r_SE.dtype)
    z, total, states = 1.0, 0.0, []
    for r, scored in zip(r_SE, scored_S, strict=True):
        states.append(c)
        if scored:
            total = total + (r * (1 - (c.clamp(max=1) if clipped else c))).sum()
        z_next = gamma * z + top_k / capacity
        c, z = (gamma * z * c + r) / z_next, z_next
    return total, int(scored_S.sum()), torch.stack(states)


def random_requests(shape, num_experts, top_k, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, num_experts, generator=generator, dtype=dtype)
    hot = requests(logits.topk(top_k).indices, num_experts).to(dtype)
    return hot, logits


def test_worked_by_hand():
    # E = 2, K = 1, C = 1, gamma = 1/2; requests 0, 0, 1. c(0) = (1/2, 1/2), Z(0) = 1.
    # Z(1) = 1/2 + 1 = 3/2, c(1) = ((1/2)(1/2) + 1, (1/2)(1/2)) / (3/2) = (5/6, 1/6)
    # Z(2) = 3/4 + 1 = 7/4, c(2) = ((3/4)(5/6) + 1, (3/4)(1/6)) / (7/4) = (13/14, 1/14)
    # misses 1/2, 1/6, 13/14; of the last two: 23/42
    r = torch.tensor([[[[1.0, 0], [1, 0], [0, 1]]]], dtype=torch.float64)
    mask = torch.ones(1, 3)
    states = cache_states(r, 1, 0.5, 1)
    torch.testing.assert_close(states[0, 0, 1], torch.tensor([5 / 6, 1 / 6], dtype=torch.float64))
    torch.testing.assert_close(states[0, 0, 2], torch.tensor([13 / 14, 1 / 14], dtype=torch.float64))
    loss = soft_cache_misses(r, mask, torch.tensor([[False, True, True]]), 1, 1, gamma=0.5)
    assert float(loss) == pytest.approx((1 / 6 + 13 / 14) / 2)


def test_every_sequence_alike_by_hand():
    """Of the case above one row scores two tokens (23/42) and one the last alone (13/14); one scores none."""
    r = torch.tensor([[[[1.0, 0], [1, 0], [0, 1]]] * 3], dtype=torch.float64)
    scored = torch.tensor([[False, True, True], [False, False, True], [False, False, False]])
    by_token, by_row = (
        soft_cache_misses(r, torch.ones(3, 3), scored, 1, 1, gamma=0.5, equal_sequences=equal)
        for equal in (False, True)
    )
    assert float(by_token) == pytest.approx((1 / 6 + 13 / 14 + 13 / 14) / 3)
    assert float(by_row) == pytest.approx(((1 / 6 + 13 / 14) / 2 + 13 / 14) / 2)


def test_clipped_by_hand():
    # gamma = 1 (like LFU), K = 1, C = 2, E = 2, always expert 0: c(0) = (1, 1), Z(t) = 1 + t/2,
    # c(1) = (1 + 1, 1) / 1.5 = (4/3, 2/3): the plain loss is -1/3, the clipped one 0.
    r = torch.tensor([[[[1.0, 0], [1, 0]]]], dtype=torch.float64)
    scored = torch.tensor([[False, True]])
    assert float(soft_cache_misses(r, torch.ones(1, 2), scored, 2, 1, gamma=1.0)) == pytest.approx(-1 / 3)
    assert float(soft_cache_misses(r, torch.ones(1, 2), scored, 2, 1, gamma=1.0, cache="clipped")) == 0.0


@pytest.mark.parametrize("gamma", [0.0, 1e-4, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_equals_a_loop_over_tokens(gamma, clipped, chunk):
    hot, _ = random_requests((2, 3, 40), 8, 2)
    scored = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) > 0.3
    loss = soft_cache_misses(hot, torch.ones(3, 40), scored, 4, 2, gamma, CLIP[clipped], chunk=chunk)
    sums = [loop_misses(hot[i, b], scored[b], 4, 2, gamma, clipped)[:2] for i in range(2) for b in range(3)]
    assert float(loss) == pytest.approx(float(sum(s for s, _ in sums)) / sum(n for _, n in sums), abs=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_the_cache_always_holds_its_capacity(gamma):
    hot, _ = random_requests((2, 300), 16, 4)
    states = cache_states(hot, 6, gamma, 4)
    torch.testing.assert_close(states.sum(-1), torch.full((2, 300), 6.0, dtype=torch.float64))
    torch.testing.assert_close(states[1], loop_misses(hot[1], torch.ones(300), 6, 4, gamma)[2])


def test_float32_stays_exact_over_long_sequences():
    hot, _ = random_requests((1, 4000), 8, 2)
    torch.testing.assert_close(
        cache_states(hot.float(), 4, 0.9, 2).double(), cache_states(hot, 4, 0.9, 2), atol=1e-5, rtol=1e-5
    )


def test_padding_on_either_side_changes_nothing():
    hot, _ = random_requests((1, 1, 10), 6, 2)
    other, _ = random_requests((1, 1, 5), 6, 2, seed=9)  # what padding happens to ask for
    scored = torch.arange(10)[None] >= 4
    no = torch.zeros(1, 5, dtype=torch.bool)
    plain = soft_cache_misses(hot, torch.ones(1, 10), scored, 3, 2)
    for parts in (("pad", "real"), ("real", "pad"), ("pad", "real", "pad")):
        r = torch.cat([other if p == "pad" else hot for p in parts], 2)
        mask = torch.cat([torch.zeros(1, 5) if p == "pad" else torch.ones(1, 10) for p in parts], 1)
        where = torch.cat([no if p == "pad" else scored for p in parts], 1)
        torch.testing.assert_close(soft_cache_misses(r, mask, where, 3, 2), plain)


def test_rows_of_different_length_count_by_token():
    hot, _ = random_requests((1, 2, 10), 6, 2)
    mask = torch.ones(2, 10)
    mask[1, 4:] = 0
    scored = mask.bool()
    both = soft_cache_misses(hot, mask, scored, 3, 2)
    first = soft_cache_misses(hot[:, :1], mask[:1], scored[:1], 3, 2)
    second = soft_cache_misses(hot[:, 1:, :4], mask[1:, :4], scored[1:, :4], 3, 2)
    assert float(both) == pytest.approx(float(10 * first + 4 * second) / 14)


def test_scored_positions_are_what_decoding_processes():
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1] * 6])
    answers = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1]])
    scored = scored_positions(mask, answers.bool())  # the last row is a conversation of two answers
    assert scored.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0] * 6, [0, 1, 0, 0, 1, 0]]
    nothing = soft_cache_misses(torch.ones(1, 4, 6, 4, requires_grad=True), mask, scored & False, 2, 1)
    assert float(nothing.detach()) == 0.0
    nothing.backward()


def test_straight_through_forward_selection_backward_probabilities():
    hot, logits = random_requests((5,), 4, 2)
    p = logits.softmax(-1).requires_grad_()
    r = straight_through_requests(hot, p)
    assert torch.equal(r, hot)
    weights = torch.randn(5, 4, dtype=torch.float64)
    (r * weights).sum().backward()
    torch.testing.assert_close(p.grad, weights)


def test_boundary_surrogate_is_the_gradient_of_a_soft_top_k():
    """Against finite differences of sigmoid((l - theta) / w) with theta solved so that they sum to K."""
    hot, logits = random_requests((1,), 7, 3, seed=4)
    weights = torch.randn(7, dtype=torch.float64)
    spread = float(logits.std())
    ordered = logits[0].sort(descending=True).values
    middle = float(ordered[2] + ordered[3]) / 2
    target = float(((logits - middle) / (0.5 * spread)).sigmoid().sum())  # K up to the choice of the middle

    def soft_top_k(values):
        low, high = -20.0, 20.0
        for _ in range(100):
            theta = (low + high) / 2
            total = float(((values - theta) / (0.5 * spread)).sigmoid().sum())
            low, high = (theta, high) if total > target else (low, theta)
        return float((((values - theta) / (0.5 * spread)).sigmoid() * weights).sum())

    leaf = logits.clone().requires_grad_()
    (boundary_surrogate(leaf, hot, 0.5) * weights).sum().backward()
    for expert in range(7):
        step = torch.zeros(7, dtype=torch.float64)
        step[expert] = 1e-5
        slope = (soft_top_k(logits[0] + step) - soft_top_k(logits[0] - step)) / 2e-5
        assert float(leaf.grad[0, expert]) == pytest.approx(slope, abs=1e-5)
    assert float(leaf.grad.sum()) == pytest.approx(0, abs=1e-12)
    first, last = int(logits.argmax()), int(logits.argmin())
    near = int((logits[0] - middle).abs().argmin())
    ones = torch.eye(7, dtype=torch.float64)
    gains = []
    for expert in (first, near, last):
        leaf = logits.clone().requires_grad_()
        (boundary_surrogate(leaf, hot, 0.1) * ones[expert]).sum().backward()
        gains.append(float(leaf.grad[0, expert]))
    assert gains[1] > max(gains[0], gains[2])  # who stands at the boundary moves


def test_boundary_surrogate_survives_extremes():
    logits = torch.tensor([[100.0, -100.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]], requires_grad=True)
    hot = torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 1]])
    boundary_surrogate(logits, hot, 0.5).sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
def test_gradient_by_finite_differences(gamma, clipped):
    r = torch.rand(2, 2, 9, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 9)
    mask[1, :3] = 0
    answers = mask.bool()
    answers[0, :4] = answers[1, :5] = False
    scored = scored_positions(mask, answers)
    assert torch.autograd.gradcheck(
        lambda x: soft_cache_misses(x, mask, scored, 3, 2, gamma, CLIP[clipped], chunk=4), (r,), eps=1e-7
    )


# ------------------------------------------------------------------ rank matching


def plain_rank_loss(tuned, base, rho):
    before = (base[..., :, None] > base[..., None, :]).to(tuned.dtype)
    gap = tuned[..., :, None] - tuned[..., None, :]
    return (before * (rho - gap).clamp_min(0)).sum((-1, -2)).mean()


def test_rank_matching_by_hand():
    # base order 0 > 1 > 2; tuned (0.5, 0.45, 0.05), rho = 0.1: only the pair (0, 1) is short, by 0.05
    base = torch.tensor([[0.6, 0.3, 0.1]])
    tuned = torch.tensor([[0.5, 0.45, 0.05]], requires_grad=True)
    loss = rank_matching(tuned, base)
    assert float(loss.detach()) == pytest.approx(0.05)
    loss.backward()
    assert tuned.grad.tolist() == [[-1.0, 1.0, 0.0]]


def test_ties_contribute_nothing():
    tuned = torch.tensor([[0.1, 0.9]], requires_grad=True)
    loss = rank_matching(tuned, torch.tensor([[0.5, 0.5]]))
    loss.backward()
    assert float(loss) == 0
    assert tuned.grad.abs().sum() == 0


@pytest.mark.parametrize("num_experts", [2, 8, 33])
def test_rank_matching_equals_the_plain_form(num_experts, monkeypatch):
    monkeypatch.setattr("melinoe.losses.rank_matching.PAIR_ELEMENTS", 3 * num_experts**2)  # several chunks
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 7, num_experts, generator=generator, dtype=torch.float64).softmax(-1)
    tuned = torch.randn(2, 7, num_experts, generator=generator, dtype=torch.float64).softmax(-1)
    base[0, 0, :2] = 0.2  # a tie
    ours, plain = tuned.clone().requires_grad_(), tuned.clone().requires_grad_()
    loss, expected = rank_matching(ours, base), plain_rank_loss(plain, base, 0.1)
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    assert torch.autograd.gradcheck(lambda x: rank_matching(x, base), (tuned.requires_grad_(),), eps=1e-8)


@pytest.mark.parametrize(("num_experts", "expected"), [(8, 0.9), (32, 35), (64, 170), (128, 747)])
def test_size_for_an_untouched_router(num_experts, expected):
    """design/method.md: at p_f = p_b the loss is far from zero and grows with E."""
    logits = torch.randn(300, num_experts, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    assert float(rank_matching(p, p)) == pytest.approx(expected, rel=0.15)


def test_rank_matching_keeps_only_integers_for_backward():
    p = torch.rand(50, 16, requires_grad=True)
    loss = rank_matching(p, torch.rand(50, 16))
    node, saved = loss.grad_fn, []
    while node is not None:
        saved += list(getattr(node, "saved_tensors", ()))
        node = node.next_functions[0][0] if node.next_functions else None
    assert [tuple(t.shape) for t in saved if t.numel() > 1] == [(50, 16)]
    assert saved[0].dtype == torch.int32
    assert rank_matching(p[:0], p[:0]).item() == 0
