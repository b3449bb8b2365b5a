"""Policies of others in the simulator, by hand and by their invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from melinoe.routing.policies import decode_call, prefill_call
from melinoe.routing.published import PUBLISHED, GlobalLRU, LeastStale, PrefillMass
from melinoe.routing.simulate import simulate
from test_simulate import random_trace


def resident(policy):
    return {(layer, expert) for layer, held in enumerate(policy.resident) for expert in held}


def test_one_pool_takes_from_other_layers():
    policy = GlobalLRU(2, 4, 1)  # two records in all
    for layer, expert in ((0, 0), (0, 1)):
        policy.request(layer, decode_call([expert]))
    assert resident(policy) == {(0, 0), (0, 1)}
    policy.request(0, decode_call([0]))
    decision = policy.request(1, decode_call([3]))
    assert decision.loads[0].victim == 1 and resident(policy) == {(0, 0), (1, 3)}


def test_what_the_call_asks_for_stays():
    policy = GlobalLRU(1, 4, 1)
    decision = policy.request(0, decode_call([2, 3]))
    assert [load.admit for load in decision.loads] == [True, False] and resident(policy) == {(0, 2)}


def test_stale_leaves_before_what_this_pass_has_used():
    policy = LeastStale(2, 4, 1)
    policy.request(0, decode_call([0]))
    policy.request(1, decode_call([1]))
    policy.request(0, decode_call([2]))  # a new pass: (0, 0) and (1, 1) are stale, the older one leaves
    assert resident(policy) == {(1, 1), (0, 2)}
    policy.request(1, decode_call([3]))
    assert resident(policy) == {(0, 2), (1, 3)}
    policy.request(0, decode_call([2]))
    policy.request(1, decode_call([0, 1]))  # more than there is room for: first the stale one, then this pass
    assert resident(policy) == {(1, 0), (1, 1)}


def test_the_prompt_decides_for_the_whole_answer():
    policy = PrefillMass(1, 4, 2)
    policy.request(0, prefill_call(np.array([[0, 1], [0, 1], [0, 2]])))
    assert policy.resident[0] == {0, 1}
    for expert in (2, 3, 2):
        [load] = policy.request(0, decode_call([expert])).loads
        assert not load.admit
    assert policy.resident[0] == {0, 1}


@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(0, 6), carry_over=st.booleans())
@settings(max_examples=40, deadline=None)
def test_nothing_is_lost_and_no_pool_overflows(seed, slots, carry_over):
    trace = random_trace(seed)
    asked = dict.fromkeys(("prefill", "decode"), 0)
    for _, _, call in trace.calls():
        asked[call.phase] += len(call.experts)
    for row in simulate(trace, list(PUBLISHED), slots, carry_over, per_sequence=True)["results"]:
        counts = {name: int(values.sum()) for name, values in row["per_sequence"].items()}
        assert counts["hits"] + counts["loads"] == asked["decode"]
        assert counts["prefill_hits"] + counts["prefill_loads"] == asked["prefill"]
    for make in PUBLISHED.values():
        policy = make(trace.num_layers, trace.num_experts, slots)
        for _, layer, call in trace.calls():
            policy.request(layer, call)
            assert len(resident(policy)) <= slots * trace.num_layers


def test_one_layer_makes_the_pool_a_layers_own():
    trace = random_trace(3, num_layers=1, prompts=False)
    own, pool = simulate(trace, "lru,global-lru", 3)["results"]
    assert pool["hit_rate"] == pytest.approx(own["hit_rate"])
