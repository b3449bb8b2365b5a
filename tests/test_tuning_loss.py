"""The terms of Eq. 6 and their sum, with answers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from melinoe.losses.likelihood import likelihood, sequence_nll
from melinoe.losses.load_price import load_price
from melinoe.losses.rank_matching import router_divergence
from melinoe.losses.tuning_loss import SCORED_TOKENS, PartOfStep, boundary_strength, cooled, tuning_loss


def scalar(value):
    return torch.tensor(value, requires_grad=True)


def test_the_sum_as_the_paper_prints_it():
    nll, misses, ranks = scalar(2.0), scalar(1.5), scalar(4.0)
    total = tuning_loss(nll, misses, ranks, 0.5, 0.1)
    assert float(total) == pytest.approx(2.0 + 0.5 * 1.5 + 0.1 * 4.0)
    total.backward()
    assert [float(term.grad) for term in (nll, misses, ranks)] == pytest.approx([1.0, 0.5, 0.1])


def test_what_is_not_asked_for_is_not_in_it():
    assert float(tuning_loss(scalar(2.0), None, None, 0.5, 0.1).detach()) == 2.0
    unused = tuning_loss(scalar(2.0), None, None, 0.5, 0.1, divergence=scalar(9.0))
    assert float(unused.detach()) == 2.0  # an aim for quality compares with the base, and distils nothing


def test_distillation_takes_its_share_of_the_quality_term():
    total = tuning_loss(
        scalar(2.0), None, None, 0.0, 0.0,
        distill=0.25, divergence=scalar(6.0), part=PartOfStep(compared=3),
    )  # fmt: skip
    assert float(total.detach()) == pytest.approx(0.75 * 2.0 + 0.25 * 6.0 / 3)


def test_the_parts_of_a_step_add_up_to_the_step():
    """Eight completion and six scored tokens in two parts, of a mean step with ten and five."""
    whole = tuning_loss(
        scalar(0.5), scalar(2.0), scalar(3.0), 0.4, 0.2,
        distill=0.5, divergence=scalar(12.0), part=PartOfStep(8 / 10, 6 / 5, 12),
    )  # fmt: skip
    parts = [
        tuning_loss(
            scalar(nll), scalar(misses), scalar(ranks), 0.4, 0.2,
            distill=0.5, divergence=scalar(divergence), part=PartOfStep(tokens / 10, scored / 5, 12),
        )
        for nll, tokens, misses, scored, ranks, divergence in (
            (0.4, 6, 1.0, 4, 1.0, 2.0), (0.8, 2, 4.0, 2, 2.0, 10.0)
        )
    ]  # fmt: skip
    assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()))
    assert float(whole.detach()) == pytest.approx(0.5 * 0.8 * 0.5 + 0.5 * 1.0 + 0.4 * 1.2 * 2.0 + 0.2 * 3.0)


def test_the_weights_fall_at_the_end():
    assert [cooled(done, 0.5) for done in (0.0, 0.2, 0.5, 0.75, 1.0)] == [1, 1, 1, 0.5, 0]
    assert [cooled(done, 0.0) for done in (0.0, 0.5, 1.0)] == [1, 1, 1]


def test_the_weights_follow_the_root_of_the_likelihood_loss():
    assert boundary_strength(None, SCORED_TOKENS) == 1.0
    assert boundary_strength(0.25, 2 * SCORED_TOKENS) == 0.5
    assert boundary_strength(0.25, SCORED_TOKENS / 4) == 2.0  # short answers: four times
    assert boundary_strength(4.0, 0.0) == 2.0 * SCORED_TOKENS


def test_likelihood_by_hand():
    # two positions over three tokens; the first predicts a prompt token, the second a completion token
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(1.0), math.log(2.0), math.log(5.0)]])
    base = torch.tensor([[0.0, 0.0, 0.0], [math.log(2.0), math.log(2.0), math.log(4.0)]])
    found = likelihood(logits, torch.tensor([0, 2]), torch.tensor([False, True]))
    assert (float(found.nll), found.tokens) == (pytest.approx(-math.log(5 / 8)), 1)
    assert found.divergence is found.base_nll is None and found.divergence_tokens == 0
    found = likelihood(logits, torch.tensor([0, 2]), torch.tensor([False, True]), base)
    expected = 2 / 8 * math.log(2 / 1) + 2 / 8 * math.log(2 / 2) + 4 / 8 * math.log(4 / 5)
    assert float(found.divergence) == pytest.approx(expected) and found.divergence_tokens == 2
    assert float(found.base_nll) == pytest.approx(-math.log(4 / 8))


def test_likelihood_of_every_row_by_hand():
    ids = torch.tensor([[7, 1, 0, 2], [7, 0, 1, 9]])
    positions = torch.tensor([[False, True, True, False], [False, True, False, False]])
    logits = torch.log(torch.tensor([[1.0, 1.0, 2.0], [2.0, 1.0, 1.0], [1.0, 3.0, 4.0]]))
    # row 0: token 0 after position 1, token 2 after position 2; row 1: token 1 after position 1
    expected = [-math.log(1 / 4) - math.log(1 / 4), -math.log(3 / 8)]
    found = sequence_nll(logits, ids, positions)
    assert found.tolist() == pytest.approx(expected) and found.dtype == torch.float64


def test_divergence_of_routers_by_hand():
    base, tuned = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    assert float(router_divergence(tuned, base)) == pytest.approx(expected)


def test_price_of_load_by_hand():
    # E = 4, K = 2: an even expert is asked by half of all tokens; expert 0 by all, expert 3 by none
    usage = torch.tensor([[1.0, 0.5, 0.5, 0.0]])
    asks = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]], requires_grad=True)
    price = load_price(asks, usage, balance=0.3, top_k=2)
    assert float(price.detach()) == pytest.approx((0.3 * 1 + 0.3 * -1) / 2)
    price.backward()
    assert asks.grad[0, 0].tolist() == pytest.approx([0.15, 0.0, 0.0, -0.15])
