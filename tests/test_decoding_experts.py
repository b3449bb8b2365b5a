"""A decoded token's experts by the compiled kernels: the bits and the decisions of the experts function."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import melinoe
from families import batch, resident, save_checkpoint
from family_configs import config
from melinoe.decoding import loop
from melinoe.decoding.compiled_experts import CompiledExperts
from melinoe.decoding.decoder import decoder_of
from melinoe.decoding.operators import native
from melinoe.experts import compiled
from melinoe.routing.policies import DecayedCounts, Policy

SETTINGS = {"max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0}
pytestmark = pytest.mark.skipif(native() is None or not compiled.prepare(), reason="no compiler")


@pytest.fixture
def counted(monkeypatch):
    """How many times each layer's compiled experts were called."""
    calls = []
    call = CompiledExperts.__call__
    monkeypatch.setattr(
        CompiledExperts, "__call__", lambda self, *given: calls.append(1) or call(self, *given)
    )
    return calls


def answered(store, run, seeds=3, policy=None, **settings):
    """(tokens, counters, decisions) of some prompts, one after the other, in a model of few slots."""
    paged = melinoe.load(store, slots=6, **({"policy": policy} if policy else {}))
    decisions, tokens = [], []
    paged.melinoe_paged.pager.watcher = lambda *decision: decisions.append(decision)
    for seed in range(seeds):
        torch.manual_seed(seed)
        tokens.append(run(paged, batch(5 + seed, seed)["input_ids"][:1], **SETTINGS, **settings))
    counters = melinoe.stats(paged).to_json()
    counters = {name: value for name, value in counters.items() if not name.endswith("stalled_seconds")}
    return torch.cat([one[0] for one in tokens]).tolist(), counters, decisions, paged


def stock(model, ids, **settings):
    return model.generate(ids, **settings)


@pytest.mark.parametrize("record_format", ["auto", "int8", "int4"])
def test_tokens_decisions_and_counters(record_format, tmp_path, counted):
    torch.manual_seed(0)
    settings = config("olmoe")
    settings.hidden_size = settings.intermediate_size = 64  # packed records are in groups of 64
    AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    melinoe.convert(tmp_path / "model", tmp_path / "store", progress=False, format=record_format)
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 20}):
        *expected, _ = answered(tmp_path / "store", stock, **settings)
        assert not counted
        *found, paged = answered(tmp_path / "store", loop.generate, **settings)
        assert found == expected
        assert decoder_of(paged).replays
        layers, tokens = len(paged.melinoe_paged.pager.banks), found[1]["decode_tokens"]
        packed = record_format == "auto" or paged.melinoe_paged.pager.packed
        if packed and compiled.few(torch.zeros(1, 1, dtype=torch.bfloat16)):
            assert layers <= len(counted) < layers * tokens  # some find all of their experts, some do not
        counted.clear()


def test_resident_transformers_say_the_same(tmp_path, counted):
    source = save_checkpoint(tmp_path / "model", "qwen2_moe", torch.bfloat16)
    melinoe.convert(source, tmp_path / "store", progress=False)
    found = answered(tmp_path / "store", loop.generate, do_sample=False)[0]
    own, expected = resident(source), []
    for seed in range(3):
        ids = batch(5 + seed, seed)["input_ids"][:1]
        expected += stock(own, ids, do_sample=False, **SETTINGS)[0].tolist()
    assert found == expected and counted


def test_a_policy_with_a_request_of_its_own_is_asked(olmoe_store, monkeypatch):
    asked = []

    class Noted(DecayedCounts):
        def request(self, layer, call):
            asked.append(layer)
            return super().request(layer, call)

    paged = melinoe.load(olmoe_store, slots=8)
    pager = paged.melinoe_paged.pager
    pager.policy = Noted(len(pager.banks), pager.store.layers[0].num_experts, 8)
    ids = batch(6)["input_ids"][:1]
    loop.generate(paged, ids, do_sample=False, **SETTINGS)
    assert len(asked) == len(pager.banks) * SETTINGS["max_new_tokens"]


@pytest.mark.parametrize("name", ["decay", "lru", "lfu", "static"])
def test_asking_for_residents_is_asking(name):
    import numpy as np

    from melinoe.routing.policies import decode_call, make_policy, prefill_call

    ours, theirs = make_policy(name, 2, 16, 12), make_policy(name, 2, 16, 12)
    generator = np.random.default_rng(0)
    for policy in (ours, theirs):
        policy.begin(np.full((2, 16), 0.25) + np.eye(2, 16))
        policy.request(0, prefill_call(np.arange(12).reshape(3, 4)))
    told = 0
    for _ in range(200):
        call = decode_call(generator.choice(16, 4, replace=False))
        decision = ours.request_resident(0, call, sorted(call.indices[0].tolist()))
        told += decision is not None
        assert (decision or ours.request(0, call)) == theirs.request(0, call)
        assert ours.resident == theirs.resident and ours.worth(0) == theirs.worth(0)
    assert 0 < told < 200
    assert Policy.request_resident is type(ours).request_resident


def test_weights_of_another_dtype_and_too_many_experts_are_left_alone():
    outputs = torch.empty(4, 64, dtype=torch.bfloat16)
    one = CompiledExperts(lambda *_: 0, [], (), outputs, torch.bfloat16)
    row, weights = torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(1, 4, dtype=torch.bfloat16)
    assert one.fits(row, weights)
    for other in ((row.float(), weights), (row, weights.float()), (row, weights[:, :3].contiguous())):
        assert not one.fits(*other)
    assert not one.fits(row, torch.zeros(4, 8, dtype=torch.bfloat16)[:, :1].t())
