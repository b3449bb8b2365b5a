"""The rules that hold for every policy, on random traces; LRU against an independent implementation."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from melinoe.errors import MelinoeError
from melinoe.routing.policies import (
    DECODE,
    FADE,
    POLICIES,
    PREFILL,
    Call,
    DecayedCounts,
    Decision,
    Policy,
    Strength,
    decode_call,
    make_policy,
    prefill_call,
)

NAMES = sorted(POLICIES)


@st.composite
def workloads(draw, prefill=True):
    """(num_experts, slots, calls, scores): random calls of one layer, some with sentinels and padding."""
    num_experts, slots = draw(st.integers(2, 12)), draw(st.integers(0, 14))
    top_k = draw(st.integers(1, min(4, num_experts)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    calls = []
    for _ in range(draw(st.integers(1, 25))):
        tokens = int(generator.integers(1, 6)) if prefill and generator.random() < 0.3 else 1
        rows = [generator.choice(num_experts, top_k, replace=False) for _ in range(tokens)]
        indices = np.stack(rows)
        if generator.random() < 0.2:  # experts of another rank
            indices = np.where(generator.random(indices.shape) < 0.3, num_experts + 1, indices)
        if tokens == 1 and generator.random() < 0.8:
            calls.append(decode_call(indices[0]))
        else:
            valid = generator.random(tokens) < 0.8
            phase = PREFILL if prefill and generator.random() < 0.7 else DECODE
            calls.append(Call(indices, np.arange(tokens - 1, -1, -1), valid, phase))
    scores = generator.random((1, num_experts)) * (generator.random((1, num_experts)) < 0.7)
    return num_experts, slots, calls, scores if generator.random() < 0.5 else None


def run(name, workload) -> tuple[Policy, list[tuple[set[int], Decision]]]:
    """The policy after the workload, and (residents before, decision) of every call."""
    num_experts, slots, calls, scores = workload
    policy = make_policy(name, 1, num_experts, slots)
    policy.begin(scores)
    log = []
    for call in calls:
        before = set(policy.resident[0])
        log.append((before, policy.request(0, call)))
    return policy, log


@pytest.mark.parametrize("name", NAMES)
@given(workload=workloads())
@settings(max_examples=60, deadline=None)
def test_rules_of_every_policy(name, workload):
    num_experts, slots, calls, _ = workload
    policy, log = run(name, workload)
    following = [before for before, _ in log[1:]] + [policy.resident[0]]
    for call, (before, decision), after in zip(calls, log, following, strict=True):
        asked = {expert for expert in call.indices.ravel().tolist() if expert < num_experts}
        served = decision.hits + [load.expert for load in decision.loads]
        assert sorted(served) == sorted(asked)  # each exactly once, sentinels never
        assert set(decision.hits) == asked & before
        admitted = [load for load in decision.loads + decision.preloads if load.admit]
        victims = [load.victim for load in admitted if load.victim is not None]
        assert set(victims) <= before
        assert len(victims) == len(set(victims))
        assert after == (before - set(victims)) | {load.expert for load in admitted}
        assert len(after) <= min(slots, num_experts)
        assert all(load.victim is None for load in decision.loads if not load.admit)
        assert all(load.admit and load.expert not in asked | before for load in decision.preloads)
        if call.phase == DECODE:
            assert not set(victims) & asked
            assert not decision.preloads
        # free slots are filled before anybody is turned out
        assert len(after) == min(slots, num_experts) or not victims


@pytest.mark.parametrize("name", NAMES)
@given(workload=workloads())
@settings(max_examples=20, deadline=None)
def test_replay_is_deterministic(name, workload):
    assert run(name, workload)[1] == run(name, workload)[1]


@pytest.mark.parametrize("name", NAMES)
@given(workload=workloads())
@settings(max_examples=30, deadline=None)
def test_prefill_ends_with_the_best(name, workload):
    num_experts, slots, calls, scores = workload
    policy = make_policy(name, 1, num_experts, slots)
    policy.begin(scores)
    for call in calls:
        before = set(policy.resident[0])
        policy.request(0, call)
        if call.phase == PREFILL:
            worth = policy.worth(0)
            known = before | {expert for expert in call.experts if expert < num_experts}
            if scores is not None and policy.uses_prediction:
                known |= set(np.flatnonzero(scores[0] > 0).tolist())
            best = sorted(known, key=lambda expert: (-worth[expert], expert))[: policy.slots]
            assert policy.resident[0] == set(best)


@given(workload=workloads(prefill=False))
@settings(max_examples=100, deadline=None)
def test_lru_equals_an_independent_implementation(workload):
    num_experts, slots, calls, _ = workload
    calls = [
        decode_call([e for e in call.indices[0] if e < num_experts]) for call in calls if call.valid.all()
    ]
    slots = min(slots, num_experts)
    policy = make_policy("lru", 1, num_experts, slots)
    # oldest first; within a token the lowest id is the oldest
    recency: OrderedDict[int, None] = OrderedDict()
    for call in calls:
        asked = sorted(call.indices[0].tolist())
        hits = [expert for expert in asked if expert in recency]
        for expert in hits:
            del recency[expert]
        misses = [expert for expert in asked if expert not in hits]
        while recency and len(recency) + len(hits) + len(misses) > slots:
            recency.popitem(last=False)
        kept = sorted(hits + misses[: slots - len(hits) - len(recency)])
        for expert in kept:
            recency[expert] = None
        decision = policy.request(0, call)
        assert decision.hits == hits
        assert policy.resident[0] == set(recency)


def test_decayed_counts_by_hand():
    policy = DecayedCounts(1, 4, 2, decay=0.5, recency_decay=0.25, recency_weight=2.0)
    policy.begin(np.array([[0.0, 0.0, 0.0, 3.0]]), strength=Strength(2))
    policy.request(0, prefill_call(np.array([[0], [1]])))
    # expert 0 was asked one token ago, expert 1 just now; the prediction counts as two tokens, if trusted
    assert policy.trust == pytest.approx(1 / (1 + np.exp(-2)))
    assert policy.worth(0) == pytest.approx([0.5 + 2 * 0.25, 1 + 2, 0, 6 * policy.trust])
    assert policy.resident[0] == {1, 3}
    policy.request(0, decode_call([2]))
    # expert 2 was predicted a thousandth of an even guess; half of the first log-odds are forgotten
    assert policy.trust == pytest.approx(1 / (1 + np.exp(-(0.5 * 2 + 2 * np.log(1e-3)))))
    assert policy.worth(0) == pytest.approx([0.25 + 2 * 0.0625, 0.5 + 2 * 0.25, 1 + 2, 6 * policy.trust])


def test_a_failing_prediction_loses_its_say_and_the_next_request_trusts_again():
    generator = np.random.default_rng(0)
    wrong = np.where(np.arange(16) < 8, 0.48, 0.02)[None] * np.ones((3, 1))
    tokens = [[generator.choice(np.arange(8, 16), 4, replace=False) for _ in range(3)] for _ in range(40)]
    hits = {}
    for name, scores in (("none", None), ("wrong", wrong), ("right", wrong[:, ::-1])):
        policy = make_policy("decay", 3, 16, 8)
        policy.begin(scores)
        for layer in range(3):
            policy.request(layer, prefill_call(generator.choice(16, (4, 4))))
        hits[name] = sum(
            len(policy.request(layer, decode_call(experts)).hits)
            for token in tokens
            for layer, experts in enumerate(token)
        )
        if name != "none":
            assert (policy.trust > 0.99) == (name == "right")
            policy.begin(scores)
            assert policy.trust == pytest.approx(0.88, abs=0.01)
    assert hits["right"] > hits["none"]
    assert hits["wrong"] > 0.85 * hits["none"]


def test_a_prediction_fades_behind_its_horizon():
    """Answers go on for longer than those that the predictor was fitted to, and elsewhere."""
    scores = np.array([[2.0, 1.0, 1.0, 0.0]])

    def prior(tokens, horizon):
        policy = DecayedCounts(1, 4, 2)
        policy.begin(scores, Strength(10.0, horizon))
        policy.request(0, prefill_call(np.array([[1]])))
        for _ in range(tokens):
            policy.request(0, decode_call([1]))  # an even guess: trust moves by forgetting alone
        return policy.worth(0)[0] / (10.0 * 2.0 * policy.trust)

    assert prior(3, 3.0) == pytest.approx(1.0)
    assert prior(5, 3.0) == pytest.approx(FADE**2)
    assert prior(5, 2.5) == pytest.approx(FADE**2.5)
    assert prior(100, float("inf")) == pytest.approx(1.0)
    policy = DecayedCounts(1, 4, 2)
    policy.begin(scores, Strength(10.0, 0.0))
    policy.request(0, decode_call([1]))
    policy.begin(scores, Strength(10.0, 1.0))  # the next request counts its own tokens
    policy.request(0, decode_call([1]))
    assert policy.worth(0)[0] == pytest.approx(10.0 * 2.0 * policy.trust)


def test_declines_what_is_worth_less_than_every_resident():
    policy = DecayedCounts(1, 3, 1, recency_weight=0.0)
    for _ in range(3):
        policy.request(0, decode_call([0]))
    [load] = policy.request(0, decode_call([1])).loads
    assert not load.admit
    assert policy.resident[0] == {0}
    for _ in range(3):
        decision = policy.request(0, decode_call([1]))
    assert policy.resident[0] == {1}
    assert decision.hits or decision.loads[0].victim == 0


def test_padding_is_served_but_says_nothing():
    for name in NAMES:
        policy = make_policy(name, 1, 4, 2)
        policy.request(0, prefill_call(np.array([[0, 1]])))
        worth = list(policy.worth(0))
        padded = Call(np.array([[2, 3]]), np.zeros(1, np.int64), np.zeros(1, bool), DECODE)
        decision = policy.request(0, padded)
        assert [load.expert for load in decision.loads] == [2, 3]
        assert policy.worth(0) == worth


def test_preloads_what_is_predicted_and_not_asked():
    policy = make_policy("decay", 1, 4, 2)
    policy.begin(np.array([[0.0, 0.0, 0.0, 2.0]]))
    decision = policy.request(0, prefill_call(np.array([[0, 1], [0, 2]])))
    assert [load.expert for load in decision.preloads] == [3]
    assert policy.resident[0] == {0, 3}


def test_a_prediction_of_another_shape_is_refused():
    with pytest.raises(MelinoeError, match="do not fit the model"):
        make_policy("decay", 2, 4, 2).begin(np.zeros((2, 5)))
    with pytest.raises(MelinoeError, match="decay, lfu, lru, static"):
        make_policy("fifo", 2, 4, 2)


def test_reset_forgets_everything():
    for name in NAMES:
        policy = make_policy(name, 1, 4, 2)
        first = policy.request(0, prefill_call(np.array([[0, 1], [2, 3]])))
        policy.begin()
        policy.reset()
        assert policy.request(0, prefill_call(np.array([[0, 1], [2, 3]]))) == first
