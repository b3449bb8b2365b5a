"""Promise 1 for every family: checkpoint -> convert -> load gives the same logits and the same tokens."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import melinoe
from families import FAMILIES, SPECIAL, batch, save_checkpoint
from melinoe.families import ADAPTED
from melinoe.moe import RouterTap, experts_modules, experts_per_token, fingerprint, moe_layers, score_kind
from melinoe.offload.experts import NAME
from melinoe.routing.policies import POLICIES, DecayedCounts

ROOMS = [(8, "decay"), (3, "lru"), (1, "decay"), (0, "static"), (4, "random")]


class RandomPolicy(DecayedCounts):
    """Keeps whatever chance says: a policy must not be able to change a result."""

    name = "random"

    def __init__(self, *args):
        self.generator = np.random.default_rng(1)
        super().__init__(*args)

    def worth(self, layer):
        return self.generator.random(self.num_experts).tolist()


def greedy(model, inputs, **settings):
    return model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, **settings)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """One family: checkpoint and store, the stock model, and ours with every expert resident."""
    folder = tmp_path_factory.mktemp(request.param)
    source = save_checkpoint(folder / "model", request.param)
    stock = AutoModelForCausalLM.from_pretrained(source).eval()
    own = AutoModelForCausalLM.from_pretrained(source).eval()
    experts_modules(own)  # dresses llama4 and dbrx
    own.set_experts_implementation(NAME)
    store = melinoe.convert(source, folder / "store", progress=False)
    return SimpleNamespace(family=request.param, source=source, stock=stock, own=own, store=store)


@torch.no_grad()
def test_paged_equals_resident(case, monkeypatch):
    monkeypatch.setitem(POLICIES, "random", RandomPolicy)
    inputs = batch()
    expected, reference = case.stock(**inputs).logits, case.own(**inputs).logits
    assert (reference - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)
    tokens = greedy(case.own, inputs)
    assert torch.equal(tokens, greedy(case.stock, inputs))
    for slots, policy in ROOMS:
        model = melinoe.load(case.store.folder, slots=slots, policy=policy)
        assert torch.equal(model(**inputs).logits, reference), (slots, policy)
        assert torch.equal(greedy(model, inputs), tokens), (slots, policy)
        assert melinoe.stats(model).decode_tokens == 14  # every new token but the first, of two sequences
        assert all(not list(module.parameters(recurse=False)) for _, module in experts_modules(model))
        assert fingerprint(model) == case.store.fingerprint == fingerprint(case.own)


@torch.no_grad()
def test_routers_say_what_the_experts_are_asked(case):
    layers = moe_layers(case.own)
    received = []
    for layer in layers:
        layer.experts.register_forward_pre_hook(lambda _module, args: received.append(args[1]))
    with RouterTap(layers) as tap:
        case.own(**batch())
    assert torch.equal(tap.indices(), torch.stack(received))
    assert tap.indices().shape == (len(layers), 18, experts_per_token(case.own))
    assert tap.records[0].logits.shape == (18, layers[0].num_experts)
    assert {score_kind(record) for record in tap.records} == {SPECIAL[case.family].score}
