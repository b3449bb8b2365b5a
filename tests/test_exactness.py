"""Promise 1: offloading never changes a result."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import melinoe
from families import FAMILIES, UNDECORATED, WAYS, RandomPolicy, batch, generate, resident, save_checkpoint
from melinoe.models.folder import resolve_model
from melinoe.models.layers import experts_modules
from melinoe.routing.policies import POLICIES

ROOMS = [(8, "decay"), (4, "lru"), (3, "decay"), (1, "lfu"), (0, "static")]


@pytest.fixture(autouse=True)
def random_policy(monkeypatch):
    monkeypatch.setitem(POLICIES, "random", RandomPolicy)


def greedy(model, inputs, **settings):
    return model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_paged_equals_resident_in_every_family(family, dtype, tmp_path):
    source = save_checkpoint(tmp_path / "model", family, dtype)
    other = {} if family in UNDECORATED else {"experts_implementation": "grouped_mm"}
    stock = AutoModelForCausalLM.from_pretrained(source, **other).eval()
    inputs = batch()
    alone = {name: value[:1] for name, value in inputs.items()}  # decodes token by token, another way through
    with torch.no_grad():
        expected = stock(**inputs).logits
        expected_first = stock(alone["input_ids"][:, :1]).logits
    expected_tokens, expected_alone = greedy(stock, inputs), greedy(stock, alone)
    # our own function with every expert resident: the reference for equality to the bit
    own = resident(source)
    with torch.no_grad():
        reference = own(**inputs).logits
        reference_first = own(alone["input_ids"][:, :1]).logits
    reference_tokens, reference_alone = greedy(own, inputs), greedy(own, alone)
    if dtype == torch.float32:
        assert (reference - expected).abs().max() < 1e-5 * expected.abs().max().clamp_min(1)
        first_limit = 1e-5 * expected_first.abs().max().clamp_min(1)
        assert (reference_first - expected_first).abs().max() < first_limit
        assert torch.equal(reference_tokens, expected_tokens)
        assert torch.equal(reference_alone, expected_alone)
    melinoe.convert(source, tmp_path / "store", progress=False)
    for slots, policy in [*ROOMS, (4, "random")]:
        model = melinoe.load(tmp_path / "store", slots=slots, policy=policy)
        assert torch.equal(model(**inputs).logits, reference), (slots, policy)
        assert torch.equal(model(alone["input_ids"][:, :1]).logits, reference_first), (slots, policy)
        assert torch.equal(greedy(model, inputs), reference_tokens), (slots, policy)
        assert torch.equal(greedy(model, alone), reference_alone), (slots, policy)
        assert all(not list(module.parameters(recurse=False)) for _, module in experts_modules(model))


@pytest.mark.parametrize("slots", [8, 3, 0])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate_equal_resident(olmoe, olmoe_store, tmp_path, way, slots):
    """Against stock transformers; test_families_table.py compares with our own resident function."""
    stock = AutoModelForCausalLM.from_pretrained(olmoe).eval()
    other = save_checkpoint(tmp_path / "assistant", "olmoe", seed=1)
    paged = melinoe.load(olmoe_store, slots=slots)
    expected = generate(stock, way, resident(other))
    assert generate(paged, way, resident(other)) == expected
    if way == "assisted":  # an assistant that is paged itself, and one whose every guess is right
        melinoe.convert(other, tmp_path / "store", progress=False)
        assert generate(paged, way, melinoe.load(tmp_path / "store", slots=slots)) == expected
        assert generate(paged, way, stock) == expected


def test_a_wrong_record_is_seen(olmoe, tmp_path):
    """The negative control: were one expert's bytes another's, the tests above would fail."""
    store = melinoe.convert(olmoe, tmp_path / "store", progress=False)
    model = melinoe.load(tmp_path / "store", slots=8)
    right = model(**batch()).logits
    path = store.path(0)
    data = bytearray(path.read_bytes())
    record = store.layers[0].layout.record_bytes
    for expert in range(store.layers[0].num_experts - 1):
        start = store.layers[0].offset(expert)
        data[start : start + record] = data[start + record : start + 2 * record]
    path.write_bytes(bytes(data))
    wrong = melinoe.load(tmp_path / "store", slots=8)(**batch()).logits
    assert (right - wrong).abs().max() > 1e-3


def test_sequences_do_not_leak_into_each_other(olmoe_store):
    """What was asked before, and what stayed in the slots, changes nothing."""
    model = melinoe.load(olmoe_store, slots=3)
    first = greedy(model, batch(seed=0))
    for seed in range(1, 4):
        greedy(model, batch(seed=seed))
    assert torch.equal(greedy(model, batch(seed=0)), first)


def test_embedded_model_is_exact(tiny_store):
    stock = AutoModelForCausalLM.from_pretrained(resolve_model("tiny")).eval()
    tokenizer = melinoe.runtime.load.load_tokenizer("tiny")
    inputs = tokenizer(["What is 12 plus 30?<sep>", "sort 3 1 2<sep>"], return_tensors="pt", padding=True)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = greedy(stock, inputs)
    for slots in (32, 8, 2):
        assert torch.equal(greedy(melinoe.load(tiny_store, slots=slots), inputs), expected)


def test_plain_from_pretrained_opens_a_store(olmoe, olmoe_store):
    model = AutoModelForCausalLM.from_pretrained(olmoe_store)
    assert melinoe.stats(model).decode_tokens == 0
    stock = AutoModelForCausalLM.from_pretrained(olmoe)
    assert torch.equal(greedy(model, batch()), greedy(stock, batch()))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in stock.parameters())


def test_gradients_are_refused(olmoe_store):
    model = melinoe.load(olmoe_store, slots=4)
    model(**batch())  # without gradients it needs no torch.no_grad()
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(melinoe.MelinoeError, match="cannot pass gradients"):
        model(**batch())


def test_continuous_batching_is_counted_as_what_it_is(olmoe_store):
    """Steps of one token per sequence are decoding, so that the policy treats them as such."""
    model = melinoe.load(olmoe_store, slots=4)
    tokens = generate(model, "generate_batch")
    found = melinoe.stats(model)
    assert found.prefill_tokens == int(batch()["attention_mask"].sum())
    assert found.decode_tokens == sum(len(one) - 1 for one in tokens)
    assert found.hit_rate is not None
