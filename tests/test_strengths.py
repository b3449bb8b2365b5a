"""`melinoe sticky`: what each strength of sticky routing costs and saves, before anybody trains."""

from __future__ import annotations

import math

import pytest

import melinoe
from melinoe.cli.sticky import _advice, _percent, _table
from melinoe.measure.trace import open_model


def test_a_row_says_what_evaluate_trace_and_simulate_say():
    found = melinoe.stickiness_table("tiny", "tiny", [0.1, 0.3], limit=12, progress=False, slots=6)
    assert [row["strength"] for row in found["rows"]] == [0.0, 0.1, 0.3]
    for row in found["rows"]:
        common = {"limit": 12, "split": "valid", "sticky": row["strength"], "progress": False}
        scored = melinoe.evaluate("tiny", "tiny", metrics="perplexity", **common)
        assert row["nll"] == pytest.approx(scored["nll"], rel=1e-6)
        recorded = melinoe.trace("tiny", "tiny", **common)
        [replayed] = melinoe.simulate(recorded, "decay", 6)["results"]
        assert row["loads_per_token"] == pytest.approx(replayed["loads_per_token"])
    plain, *others = found["rows"]
    assert plain["perplexity_ratio"]["ratio"] == plain["loads_ratio"]["ratio"] == 1
    assert all(row["loads_ratio"]["ratio"] < 1 for row in others)
    assert [row["loads_per_token"] for row in found["rows"]] == sorted(
        (row["loads_per_token"] for row in found["rows"]), reverse=True
    )


def test_the_best_is_the_strongest_within_what_is_allowed():
    def best(allowed):
        return melinoe.stickiness_table(
            "tiny", "tiny", [0.02, 0.3, 1.0], limit=12, progress=False, max_quality_loss=allowed
        )

    rows = best(0.0)["rows"][1:]
    costs = [row["perplexity_ratio"]["ratio"] - 1 for row in rows]
    for allowed in (0.002, max(costs) + 0.01):
        wanted = [row["strength"] for row, cost in zip(rows, costs, strict=True) if cost <= allowed]
        assert best(allowed)["best"] == max(wanted, default=None)
    assert best(-1.0)["best"] is None


def test_a_loaded_model_is_measured_against_its_plain_routing():
    found = melinoe.stickiness_table(open_model("tiny", sticky=0.5), "tiny", [1.0], limit=8, progress=False)
    plain = melinoe.evaluate("tiny", "tiny", limit=8, split="valid", metrics="perplexity", progress=False)
    assert found["rows"][0]["nll"] == pytest.approx(plain["nll"], rel=1e-6)


def test_a_strength_that_is_futile_is_the_last_that_is_tried(monkeypatch):
    monkeypatch.setattr("melinoe.measure.stickiness.FUTILE", 0.0005)
    found = melinoe.stickiness_table(
        "tiny", "tiny", [0.01, 0.4, 1.0], limit=12, progress=False, max_quality_loss=0.0
    )
    assert [row["strength"] for row in found["rows"]] == [0.0, 0.01, 0.4]


@pytest.mark.parametrize("strengths", [[], [0.0, 0.1], [-0.1], [2.0], [0.05, math.nan, 0.1], [math.inf]])
def test_what_is_no_strength_is_refused(strengths):
    with pytest.raises(melinoe.MelinoeError, match="not strengths to try"):
        melinoe.stickiness_table("tiny", "tiny", strengths, limit=4, progress=False)


def test_a_strength_that_saves_nothing_is_not_advised():
    found = melinoe.stickiness_table("tiny", "tiny", [1e-9], limit=8, progress=False)
    assert found["rows"][1]["loads_ratio"]["ratio"] == 1 and found["best"] is None
    assert _advice(found) == "no strength that was tried saves loads for at most 1.0% of perplexity"
    assert "-0.0" not in _table(found)
    assert [_percent(ratio) for ratio in (0.99999, 1.0, 1.015, 0.98)] == ["0.0%", "0.0%", "+1.5%", "-2.0%"]


def test_more_slots_than_experts_are_refused():
    with pytest.raises(melinoe.MelinoeError, match="more slots than experts; got 33; allowed: at most 32"):
        melinoe.stickiness_table("tiny", "tiny", [0.1], limit=4, slots=33, progress=False)
