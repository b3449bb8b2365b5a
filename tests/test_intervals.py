"""Ratios in pairs, balance and fixed sets: answers worked by hand."""

import math

import numpy as np
import pytest

from melinoe.errors import MelinoeError
from melinoe.measure.intervals import perplexity_ratio, ratio_of_sums
from melinoe.routing.concentration import load_entropy, static_hits
from melinoe.routing.policies import DECODE
from melinoe.routing.simulate import simulate
from melinoe.routing.trace import from_sequences


def test_perplexity_ratio_by_hand():
    """(6 + 2) / 8 tokens against (4 + 2) / 8: exp(0.25), whatever the lengths of the sequences."""
    found = perplexity_ratio(np.array([6.0, 2.0]), np.array([4.0, 2.0]), np.array([6, 2]))
    assert found["ratio"] == pytest.approx(math.exp(0.25))
    # a resampling draws the first sequence never, once or twice: exp(0), exp(2 / 8) or exp(2 / 6)
    assert found["low"] == pytest.approx(1.0)
    assert found["high"] == pytest.approx(math.exp(1 / 3))
    nll = np.array([1.0, 5.0, 2.0])
    assert perplexity_ratio(nll, nll, np.array([1, 2, 3])) == {"ratio": 1.0, "low": 1.0, "high": 1.0}


def test_intervals_are_paired():
    """Sequences differ a thousandfold, the models by exactly two: no spread is left."""
    loads = np.array([1.0, 10.0, 1000.0])
    assert ratio_of_sums(2 * loads, loads) == pytest.approx({"ratio": 2.0, "low": 2.0, "high": 2.0})
    generator = np.random.default_rng(1)
    noise = generator.normal(0, 0.1, 400)
    found = perplexity_ratio(2.0 + noise, np.full(400, 2.0), np.ones(400))
    half = 1.96 * noise.std() / math.sqrt(400)  # of the mean difference, in nats
    assert math.log(found["high"] / found["low"]) / 2 == pytest.approx(half, rel=0.1)
    with pytest.raises(MelinoeError, match="are not the same sequences"):
        ratio_of_sums(loads, loads[:2])


def test_load_entropy_by_hand():
    counts = np.array([[5, 5, 5, 5], [20, 0, 0, 0], [10, 0, 10, 0], [0, 0, 0, 0]])
    assert load_entropy(counts) == pytest.approx([1.0, 0.0, 0.5, 0.0])


def two_sequences():
    """One layer, four experts, one per token; decoded: 0 0 1 and 2 2 3 3 (the prompts ask for 3)."""
    decoded = [[0, 0, 1], [2, 2, 3, 3]]
    indices = [np.array([3, *asked]).reshape(-1, 1, 1) for asked in decoded]
    token_ids = [[7] * (len(asked) + 2) for asked in decoded]
    return from_sequences(indices, token_ids, [1, 1], num_experts=4)


def test_static_hits_by_hand():
    trace = two_sequences()
    one = static_hits(trace, 1)
    assert one["requests"].tolist() == [3, 4]
    assert one["own"].tolist() == [2, 2]  # expert 0; expert 2 or 3
    assert one["shared"].tolist() == [2, 0]  # 0, 2 and 3 are asked twice each: the lowest id
    two = static_hits(trace, 2)
    assert two["own"].tolist() == [3, 4]
    assert two["shared"].tolist() == [2, 2]
    assert static_hits(trace, 9)["shared"].tolist() == [3, 4]
    assert static_hits(trace, 0)["own"].tolist() == [0, 0]
    assert load_entropy(trace.request_counts(DECODE).sum(0)) == pytest.approx(
        [(3 * 2 / 7 * math.log(7 / 2) + math.log(7) / 7) / math.log(4)]
    )


def test_static_hits_are_those_of_the_simulator():
    generator = np.random.default_rng(0)
    lengths = [9, 4, 17, 2]
    indices = [
        np.stack([np.stack([generator.permutation(8)[:2] for _ in range(3)]) for _ in range(n)])
        for n in lengths
    ]
    trace = from_sequences(indices, [[1] * (n + 1) for n in lengths], [2, 3, 5, 1], num_experts=8)
    rows = simulate(trace, "static-oracle,static-global", 3, per_sequence=True)["results"]
    found = static_hits(trace, 3)
    for name, row in zip(("own", "shared"), rows, strict=True):
        assert found[name].tolist() == row["per_sequence"]["hits"].tolist()
