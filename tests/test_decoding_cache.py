"""Keys and values that are written behind one another: no token of another text, whoever holds the cache."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from families import batch
from family_configs import config
from melinoe.decoding import groups, growing, loop
from melinoe.decoding.decoder import decoder_of
from melinoe.decoding.growing import ROOM, Append

HEAD = 32  # bfloat16 numbers: 64 bytes


def made(family="olmoe", dtype=torch.bfloat16, **changes):
    settings = config(family)
    sizes = {"hidden_size": 2 * HEAD, "num_attention_heads": 2, "num_key_value_heads": 2}
    for name, value in {**sizes, **changes}.items():
        setattr(settings, name, value)
    settings.head_dim = HEAD
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and parameter.numel() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def prompt(length=9, seed=0):
    return batch(length, seed)["input_ids"][:1]


def settings(count, **more):
    return {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0, **more}


def grows(model):
    return [step for step in decoder_of(model).steps if isinstance(step, Append)]


@pytest.fixture(scope="module")
def model():
    one = made()
    loop.generate(one, prompt(), **settings(6))
    assert len(grows(one)) == 2 * one.config.num_hidden_layers
    return one


def test_beyond_the_room_that_was_made(model):
    count = 3 * ROOM + 5
    for length, seed in ((5, 0), (40, 1), (3, 2)):  # later texts are longer and shorter
        ids = prompt(length, seed)
        assert torch.equal(
            loop.generate(model, ids, **settings(count)), model.generate(ids, **settings(count))
        )


def kept(model, run, ids, count):
    """A cache that goes on after `generate`, and the tokens."""
    cache = DynamicCache(config=model.config)
    tokens = run(ids, past_key_values=cache, **settings(count))
    return cache, tokens


def ours(model):
    return lambda ids, **more: loop.generate(model, ids, **more)


def same(one, other):
    for ours_, theirs in zip(one.layers, other.layers, strict=True):
        assert torch.equal(ours_.keys, theirs.keys) and torch.equal(ours_.values, theirs.values)


def test_a_cache_goes_on_where_it_ended(model):
    cache, tokens = kept(model, ours(model), prompt(), 12)
    theirs, expected = kept(model, model.generate, prompt(), 12)
    same(cache, theirs)
    for _ in range(2):
        tokens = loop.generate(model, tokens, past_key_values=cache, **settings(ROOM))
        expected = model.generate(expected, past_key_values=theirs, **settings(ROOM))
        assert torch.equal(tokens, expected)
        same(cache, theirs)


def shallow(cache):
    """A cache whose layers hold the same tensors, and whatever else hangs on them."""
    one = copy.copy(cache)
    one.layers = [copy.copy(layer) for layer in cache.layers]
    return one


def test_texts_that_go_on_from_one_cache_in_turns(model):
    answers = []
    for run in (ours(model), model.generate):
        cache, tokens = kept(model, run, prompt(), 12)
        before = [layer.keys.clone() for layer in cache.layers]
        caches = [copy.deepcopy(cache), shallow(cache), copy.deepcopy(cache), shallow(cache)]
        texts = [torch.cat([tokens, torch.tensor([[7 + number]])], dim=1) for number in range(4)]
        for _ in range(2):
            for number, one in enumerate(caches):
                texts[number] = run(texts[number], past_key_values=one, **settings(9))
        assert all(torch.equal(layer.keys, one) for layer, one in zip(cache.layers, before, strict=True))
        answers.append(torch.cat(texts))
    assert torch.equal(*answers)


def test_a_cropped_cache_and_who_holds_what_was_there(model):
    answers = []
    for run in (ours(model), model.generate):
        cache, tokens = kept(model, run, prompt(), 12)
        held = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
        cache.crop(-6)
        text = torch.cat([tokens[:, :-6], torch.tensor([[3]])], dim=1)
        answers.append(run(text, past_key_values=cache, **settings(20)))
        assert all(torch.equal(now, then) for now, then in held)
    assert torch.equal(*answers)


def test_without_programs_it_is_the_same(monkeypatch):
    monkeypatch.setattr(groups, "native", lambda: None)
    one = made()
    for seed in range(2):
        ids = prompt(seed=seed)
        assert torch.equal(loop.generate(one, ids, **settings(40)), one.generate(ids, **settings(40)))
    assert decoder_of(one).replays == 1 and len(grows(one)) == 4  # behind what torch computes before


def test_what_cannot_grow_so_is_concatenated():
    layer = DynamicCache(config=made().config).layers[0]
    new = torch.randn(1, 2, 1, HEAD)
    layer.lazy_initialization(new, new)
    layer.keys = torch.randn(1, 2, 5, HEAD)
    assert growing.fits(layer, "keys", new)
    assert not growing.fits(layer, "keys", torch.randn(1, 2, 2, HEAD))  # two tokens
    assert not growing.fits(layer, "keys", torch.randn(1, 2, 1, HEAD).double())
    layer.keys = torch.randn(2, 2, 5, HEAD)
    assert not growing.fits(layer, "keys", torch.randn(2, 2, 1, HEAD))  # two texts
    layer.keys = torch.randn(1, 2, 5, 12)
    assert not growing.fits(layer, "keys", torch.randn(1, 2, 1, 12))  # rows of 48 bytes


def test_growing_is_concatenating():
    layer = DynamicCache(config=made().config).layers[0]
    wanted = layer.keys = torch.randn(1, 2, 5, HEAD)
    seen = []
    for _ in range(3 * ROOM):
        new = torch.randn(1, 2, 1, HEAD)
        wanted = torch.cat([wanted, new], dim=-2)
        seen.append((growing.append(layer, "keys", new), wanted))
    assert all(torch.equal(one, other) for one, other in seen)  # the early ones too
    assert layer.keys is seen[-1][0]


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 1, 32), (8, 4, 64), (2, 1, 128), (6, 1, 256)])
def test_attention_reads_keys_with_room_alike(heads, groups, width):
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for dtype in (torch.bfloat16, torch.float32):
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(2, 1, heads // groups, 700, width, generator=generator).to(dtype)
        query = torch.randn(1, heads, 1, width, generator=generator).to(dtype)
        for tokens in (*range(1, 80), 127, 128, 129, 500, 511, 512, 513, 700):
            keys, values = (one[:, :, :tokens] for one in whole)
            apart = sdpa(query, keys, values, scale=0.1, enable_gqa=groups > 1)
            in_one = sdpa(query, keys.contiguous(), values.contiguous(), scale=0.1, enable_gqa=groups > 1)
            assert torch.equal(apart, in_one), tokens


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_eager_attention_and_windows_concatenate(implementation):
    family, changes = ("olmoe", {}) if implementation == "eager" else ("mixtral", {"sliding_window": 12})
    one = made(family, _attn_implementation=implementation, **changes)
    for length in (5, 20):
        ids = prompt(length)
        assert torch.equal(loop.generate(one, ids, **settings(20)), one.generate(ids, **settings(20)))
    assert not grows(one)
