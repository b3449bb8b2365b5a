"""The compiled replay is the policy objects': same hits, loads and evictions of every request."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from melinoe.routing import compiled
from melinoe.routing.policies import LRU, make_policy
from melinoe.routing.simulate import simulate
from melinoe.routing.trace import Trace
from test_simulate import random_trace

pytest.importorskip("numba")


def batched_trace(seed: int) -> Trace:
    """Calls of several tokens in both phases, padding, sentinels, an expert asked for twice by a token."""
    generator = np.random.default_rng(seed)
    experts, layers, top_k, sequences = 7, 2, 3, 3
    sizes, phases, ages, valid, sequence = [], [], [], [], []
    for request in range(4):
        for phase in (0, *[1] * int(generator.integers(0, 12)), 0, 1, 1):
            size = int(generator.integers(1, 9)) if phase == 0 or generator.random() < 0.3 else 1
            sizes.append(size)
            phases.append(phase)
            ages += generator.integers(0, 5, size).tolist() if size > 1 else [0]
            valid += (generator.random(size) < 0.8).tolist()
            sequence += [request] * size
    count = sum(sizes)
    return Trace(
        indices=generator.integers(0, experts + 1, (count, layers, top_k)),  # `experts` is a sentinel
        call_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        call_phase=np.array(phases),
        sequence=np.array(sequence),
        ages=np.array(ages),
        valid=np.array(valid),
        token_ids=np.zeros(count),
        prompt_lengths=np.ones(sequences + 1),
        num_experts=experts,
    )


def both(trace, name, slots, carry_over, monkeypatch_long):
    """(by the objects, compiled): the counts of every request."""
    found = []
    for long in (2**60, 0):
        monkeypatch_long.setattr(compiled, "LONG", long)
        found.append(simulate(trace, name, slots, carry_over, per_sequence=True)["results"][0])
    return found


@given(
    seed=st.integers(0, 2**32 - 1),
    slots=st.integers(0, 9),
    carry_over=st.booleans(),
    name=st.sampled_from(["lru", "lfu", "decay"]),
    batched=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_compiled_and_objects_agree(seed, slots, carry_over, name, batched):
    trace = batched_trace(seed) if batched else random_trace(seed, num_experts=12, top_k=3)
    with pytest.MonkeyPatch.context() as patch:
        own, twin = both(trace, name, slots, carry_over, patch)
    for column, values in own.pop("per_sequence").items():
        assert np.array_equal(values, twin["per_sequence"][column]), column
    twin.pop("per_sequence")
    assert own == twin


@pytest.mark.parametrize("name", ["lru", "lfu", "decay"])
def test_a_long_sequence_with_near_ties(name):
    """Hundreds of tokens over few experts: worth comes close, and the last bit would show."""
    generator = np.random.default_rng(0)
    count = 1500
    order = np.array([generator.permutation(16)[:4] for _ in range(count)]).reshape(count, 1, 4)
    trace = Trace(
        indices=order,
        call_offsets=np.arange(count + 1),
        call_phase=np.ones(count),
        sequence=np.zeros(count),
        ages=np.zeros(count),
        valid=np.ones(count, bool),
        token_ids=np.zeros(count),
        prompt_lengths=np.ones(1),
        num_experts=16,
    )
    for slots in (1, 4, 8, 15):
        with pytest.MonkeyPatch.context() as patch:
            own, twin = both(trace, name, slots, False, patch)
        assert own["evictions"] == twin["evictions"] and own["hit_rate"] == twin["hit_rate"]


def test_what_has_no_twin_is_replayed_by_its_object(monkeypatch):
    class Mine(LRU):
        """Another rule under our name."""

    assert compiled.can_replay(make_policy("decay", 1, 4, 2), predicted=False)
    assert not compiled.can_replay(make_policy("decay", 1, 4, 2), predicted=True)
    assert compiled.can_replay(make_policy("lru", 1, 4, 2), predicted=True)  # it does not look at it
    assert not compiled.can_replay(make_policy("static", 1, 4, 2), predicted=False)
    assert not compiled.can_replay(Mine(1, 4, 2), predicted=False)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert not compiled.can_replay(make_policy("lru", 1, 4, 2), predicted=False)
