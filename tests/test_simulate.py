"""Traces and their replay: totals by hand, bounds that bound, files that refuse."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from melinoe.errors import MelinoeError
from melinoe.measure.intervals import ratio_of_sums
from melinoe.routing.policies import Strength, mean_strength
from melinoe.routing.simulate import simulate
from melinoe.routing.trace import Trace, from_sequences, joined


def random_trace(seed, num_sequences=3, num_layers=2, num_experts=8, top_k=2, prompts=True) -> Trace:
    """Zipf-like requests; with `prompts` False every prompt is one token, so that all but it is decoding."""
    generator = np.random.default_rng(seed)
    indices, tokens, prompt_lengths = [], [], []
    for _ in range(num_sequences):
        prompt, decoded = int(generator.integers(1, 8)) if prompts else 1, int(generator.integers(0, 20))
        length = prompt + decoded + 1
        liking = generator.dirichlet(np.full(num_experts, 0.5), num_layers) + 1e-3
        rows = [
            [generator.choice(num_experts, top_k, replace=False, p=p / p.sum()) for p in liking]
            for _ in range(length)
        ]
        indices.append(np.array(rows))
        tokens.append(generator.integers(0, 50, length).tolist())
        prompt_lengths.append(prompt)
    return from_sequences(indices, tokens, prompt_lengths, num_experts, fingerprint="f" * 16, model="random")


def by_hand() -> Trace:
    """One layer, three experts, top-1: the prompt asks 0 0 1, decoding asks 2 0 0 2."""
    rows = np.array([0, 0, 1, 2, 0, 0, 2, 1]).reshape(-1, 1, 1)
    return from_sequences([rows], [list(range(8))], [3], 3)


def test_calls_of_a_sequence():
    trace = by_hand()
    calls = list(trace.calls())
    assert [(number, layer, call.phase, call.indices.ravel().tolist()) for number, layer, call in calls] == [
        (0, 0, "prefill", [0, 0, 1]),
        (1, 0, "decode", [2]),
        (2, 0, "decode", [0]),
        (3, 0, "decode", [0]),
        (4, 0, "decode", [2]),
    ]
    assert calls[0][2].ages.tolist() == [2, 1, 0]
    assert trace.begins.tolist() == [True, False, False, False, False]
    assert trace.prompts() == [[0, 1, 2]]
    assert trace.frequencies("decode").tolist() == [[[0.5, 0.0, 0.5]]]
    assert trace.frequencies("prefill")[0, 0] == pytest.approx([2 / 3, 1 / 3, 0])


def test_totals_by_hand():
    lru, belady, oracle, none = (
        simulate(by_hand(), name, slots)["results"][0]
        for name, slots in [("lru", 1), ("belady", 1), ("static-oracle", 2), ("lru", 0)]
    )
    # lru keeps 1 after the prompt: 2 0 miss, 0 hits, 2 misses
    assert (lru["hit_rate"], lru["loads_per_token"], lru["evictions"]) == (0.25, 0.75, 3)
    # belady keeps 0 after the prompt, declines 2, hits 0 0
    assert (belady["hit_rate"], belady["loads_per_token"]) == (0.5, 0.5)
    # the best set {0, 2}: 0 stays from the prompt, 2 is preloaded
    assert (oracle["hit_rate"], oracle["preload_loads_per_sequence"], oracle["total_loads_per_token"]) == (
        1,
        1,
        3 / 4,
    )
    assert (none["hit_rate"], none["loads_per_token"], none["prefill_loads_per_sequence"]) == (0, 1, 2)
    assert (lru["num_tokens"], lru["num_sequences"]) == (4, 1)


@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(0, 9), carry_over=st.booleans())
@settings(max_examples=60, deadline=None)
def test_belady_bounds_on_demand_policies(seed, slots, carry_over):
    trace = random_trace(seed, prompts=False)
    results = simulate(trace, "belady,decay,lru,lfu", slots, carry_over)["results"]
    loads = {result["policy"]: result["loads_per_token"] * result["num_tokens"] for result in results}
    prefill = {result["policy"]: result["prefill_loads_per_sequence"] for result in results}
    total = {name: loads[name] + prefill[name] * trace.num_sequences for name in loads}
    assert total["belady"] <= min(total.values()) + 1e-6
    if not carry_over:
        assert loads["belady"] <= min(loads.values()) + 1e-6


@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_hits_and_loads_are_all_that_was_asked(seed, slots):
    trace = random_trace(seed)
    asked = sum(len(call.experts) for _, _, call in trace.calls() if call.phase == "decode")
    for result in simulate(trace, "decay,lru,static,belady,static-oracle", slots, per_sequence=True)[
        "results"
    ]:
        counts = result["per_sequence"]
        assert counts["hits"].sum() + counts["loads"].sum() == asked
        assert counts["tokens"].sum() == trace.decoded.sum()
    assert simulate(trace, "decay", slots) == simulate(trace, "decay", slots)


def test_a_perfect_prediction_helps_and_is_marked():
    trace = random_trace(5, num_sequences=40, num_experts=16)
    plain, predicted = (
        simulate(trace, "decay", 4, predictor_scores=scores)["results"][0]
        for scores in (None, trace.frequencies("decode"))
    )
    assert predicted["loads_per_token"] < plain["loads_per_token"]
    assert (plain["prediction"], predicted["prediction"]) == (False, True)


def test_all_experts_resident_never_load_while_warm():
    trace = random_trace(1, num_sequences=8)
    [result] = simulate(trace, "decay", 8, carry_over=True)["results"]
    assert result["evictions"] == 0
    assert result["loads_per_token"] * result["num_tokens"] <= 16


def test_several_policies_at_several_sizes():
    results = simulate(random_trace(2), ["lru", "decay"], [2, 4])["results"]
    assert [(result["policy"], result["slots"]) for result in results] == [
        ("lru", 2), ("lru", 4), ("decay", 2), ("decay", 4),
    ]  # fmt: skip


def test_mistakes_are_named():
    trace = by_hand()
    with pytest.raises(MelinoeError, match=r"unknown policy; got 'fifo'; allowed: decay.*belady"):
        simulate(trace, "lru,fifo")
    with pytest.raises(MelinoeError, match="not a number of slots"):
        simulate(trace, "lru", -1)
    with pytest.raises(MelinoeError, match="do not fit the trace"):
        simulate(trace, "decay", predictor_scores=np.zeros((1, 2, 3)))


def test_a_batch_of_sequences_is_one_request():
    """Two padded sequences in one prefill call, then decoding side by side."""
    trace = Trace(
        indices=np.array([0, 0, 1, 2, 0, 1]).reshape(-1, 1, 1),
        call_offsets=np.array([0, 4, 6]),
        call_phase=np.array([0, 1]),
        sequence=np.array([0, 0, 1, 1, 0, 1]),
        ages=np.array([1, 0, 1, 0, 0, 0]),
        valid=np.array([False, True, True, True, True, True]),
        token_ids=np.arange(6),
        prompt_lengths=np.array([1, 2]),
        num_experts=3,
    )
    [result] = simulate(trace, "lru", 3, per_sequence=True)["results"]
    assert (result["num_sequences"], result["num_tokens"], result["hit_rate"]) == (1, 2, 1.0)
    assert trace.prompts() == [[1], [2, 3]]


def test_two_policies_are_compared_in_pairs():
    trace = random_trace(0, num_sequences=60)
    belady, lru = simulate(trace, "belady,lru", 4, per_sequence=True)["results"]
    ratio = ratio_of_sums(belady["per_sequence"]["loads"], lru["per_sequence"]["loads"])
    assert ratio["low"] < ratio["ratio"] < ratio["high"] < 1
    assert ratio["ratio"] == pytest.approx(belady["loads_per_token"] / lru["loads_per_token"])


def test_a_file_returns_what_was_saved(tmp_path):
    trace = random_trace(3)
    path = trace.save(tmp_path / "folder" / "a.trace")
    again = Trace.load(path)
    names = "indices call_offsets call_phase sequence ages valid token_ids prompt_lengths"
    for name in names.split():
        assert np.array_equal(getattr(again, name), getattr(trace, name)), name
    assert (again.fingerprint, again.model, again.num_experts) == ("f" * 16, "random", 8)
    assert [file.name for file in path.parent.iterdir()] == ["a.trace"]  # no temporary file stays
    assert simulate(path, "lru") == simulate(trace, "lru")


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(MelinoeError, match="no such trace file"):
        simulate(tmp_path / "missing")
    text = tmp_path / "text"
    text.write_text("hello, this is not a trace")
    with pytest.raises(MelinoeError, match="is not a trace file"):
        Trace.load(text)
    other = tmp_path / "other.safetensors"
    save_file({"x": np.zeros(1)}, other)
    with pytest.raises(MelinoeError, match="is not a trace; got no format"):
        Trace.load(other)
    save_file({"x": np.zeros(1)}, other, {"format": "melinoe-trace", "version": "99"})
    with pytest.raises(MelinoeError, match="another version; got 99"):
        Trace.load(other)


def test_arrays_that_do_not_fit_are_refused():
    trace = by_hand()
    with pytest.raises(MelinoeError, match="do not fit each other"):
        Trace(**{**vars(trace), "call_offsets": np.array([0, 2])})


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_some_sequences_alone_replay_as_they_did_among_others(seed):
    trace, kept = random_trace(seed, num_sequences=5), [3, 1]
    some = trace.only(kept)
    assert some.num_sequences == 2 and some.prompts() == [trace.prompts()[1], trace.prompts()[3]]
    whole, part = (
        simulate(one, "decay", 3, per_sequence=True)["results"][0]["per_sequence"] for one in (trace, some)
    )
    for name, counts in part.items():
        assert counts.tolist() == whole[name][[1, 3]].tolist(), name
    both = joined([trace.only([0, 2, 4]), some])
    assert (both.frequencies() == trace.frequencies()[[0, 2, 4, 1, 3]]).all()


def test_traces_of_different_models_are_not_joined():
    with pytest.raises(MelinoeError, match="are of different models"):
        joined([random_trace(0), replace(random_trace(0), fingerprint="g" * 16)])


def test_a_preload_that_nobody_asks_for_is_wasted():
    """The prompt asks 0 0 1, decoding 2 0 0 2: expert 2 is used, expert 3 is not."""
    trace = by_hand()
    trace = replace(trace, num_experts=4)
    for liked, wasted in ((2, 0), (3, 1)):
        scores = np.zeros((1, 1, 4))
        scores[0, 0, liked] = 9.0
        row = simulate(trace, "static", 1, predictor_scores=scores)["results"][0]
        assert row["preload_loads_per_sequence"] == 1
        assert row["wasted_preloads_per_sequence"] == wasted


def test_each_sequence_has_a_strength_of_its_own():
    trace, strengths = random_trace(5, num_sequences=4), [Strength(9.0 * n, 3.0 * n) for n in range(1, 5)]
    scores = trace.frequencies()
    together = simulate(trace, "decay", 3, predictor_scores=scores, strength=strengths, per_sequence=True)[
        "results"
    ][0]["per_sequence"]["loads"]
    for number, strength in enumerate(strengths):
        alone = simulate(
            trace.only([number]), "decay", 3, predictor_scores=scores[[number]], strength=strength
        )["results"][0]
        assert alone["loads_per_token"] * alone["num_tokens"] == pytest.approx(together[number])
    assert mean_strength(strengths[:2]) == Strength(13.5, 4.5)
