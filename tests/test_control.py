"""The weight that steers itself: towards a hit rate, or up to a quality loss."""

from __future__ import annotations

import math

import pytest

from melinoe.config import parse_share
from melinoe.errors import MelinoeError
from melinoe.tuning.settings import TuneSettings
from melinoe.tuning.step.weight_control import REACH, WeightController


def world(factor: float) -> tuple[float, float]:
    """A model that hits more and answers worse as the weight grows: (hit rate, nats above the base)."""
    return 1 - 0.5 / (1 + factor), 0.004 * factor


@pytest.mark.parametrize("target", [0.6, 0.8, 0.9])
def test_reaches_a_hit_rate_from_either_side(target):
    weight = WeightController(target, None, 400)
    for _ in range(400):
        weight.step(world(weight.factor)[0], None)
    assert world(weight.factor)[0] == pytest.approx(target, abs=0.01)


def test_spends_the_quality_that_may_be_spent():
    weight = WeightController(None, 0.02, 400)
    for _ in range(400):
        weight.step(*world(weight.factor))
    assert world(weight.factor)[1] == pytest.approx(math.log(1.02), rel=0.1)


def test_moves_at_most_so_far_and_not_without_an_aim():
    weight = WeightController(0.99, None, 100)
    weight.step(0.1, None)
    assert weight.factor == pytest.approx(math.exp(REACH / 100))
    weight.step(float("nan"), None)
    assert weight.factor == pytest.approx(math.exp(REACH / 100))
    still = WeightController(None, None, 100)
    still.step(0.1, 3.0)
    assert still.factor == 1.0 and not still.steers


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_hit_rate": 1.0},
        {"max_quality_loss": 0.0},
        {"target_hit_rate": 0.8, "max_quality_loss": 0.01},
        {"target_hit_rate": 0.8, "lambda_cs": 0.0},
        {"objective": "fast"},
        {"distill": 1.5},
        {"cooldown": -0.1},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(MelinoeError):
        TuneSettings(**wrong)


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.01", 0.01), (" 85 %", 0.85), (".5", 0.5)])
def test_shares_are_read(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["one percent", "-1%", "1%%", ""])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(MelinoeError, match="not a share"):
        parse_share(text)


def test_learning_rates_follow_the_width():
    assert TuneSettings().learning_rates(192) == pytest.approx((0.75 / 192, 0.38 / 192))
    assert TuneSettings(learning_rate=1e-3, router_learning_rate=0.0).learning_rates(192) == (1e-3, 0.0)
