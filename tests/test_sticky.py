"""Sticky routing: each sequence keeps to the experts that its own past has asked for."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import melinoe
from families import FAMILIES, batch, generate, resident, save_checkpoint
from melinoe.adapters.merge import merge
from melinoe.conversion.checkpoint import Checkpoint
from melinoe.measure.trace import trace
from melinoe.models.layers import moe_layers
from melinoe.models.router_tap import RouterTap
from melinoe.runtime.load import load_resident
from melinoe.sticky.answering import plain_copy
from melinoe.sticky.history import History
from melinoe.sticky.model import can_be_sticky, make_sticky
from melinoe.sticky.settings import Stickiness, stickiness

STRONG = Stickiness(strength=0.5, experts=3, after=4)
LOGITS = Stickiness(strength=2.0, experts=3, after=4, unit="logit")
# the others choose by more than logits or their softmax: sigmoids with corrections, groups,
# masks; or once more behind the router
KNOWN = (
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "gpt_oss", "granitemoe", "jamba",
    "hunyuan_v1_moe", "flex_olmo", "gemma4_text",
)  # fmt: skip


def ids(rows: int = 1, length: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def routing(model, tokens):
    """([L, S, K] choices, [L, S, K] weights, [L, S, E] logits) of one pass of one sequence."""
    layers = moe_layers(model)
    with torch.no_grad(), RouterTap(layers) as tap:
        model(tokens)
    logits = [record.logits for record in tap.records]
    logits = [x.log() if (x >= 0).all() else x for x in logits]  # gemma4 records probabilities
    return tap.indices(), torch.stack([record.weights for record in tap.records]), torch.stack(logits)


@pytest.fixture(scope="module")
def sticky(olmoe):
    model = resident(olmoe)
    make_sticky(model, STRONG)
    return model


def by_hand(logits, top_k, settings):
    """The rule of docs/sticky.md for one sequence, token by token. logits: [S, E]."""
    counts, found = [0] * logits.shape[1], []
    for t, row in enumerate(logits.tolist()):
        own = sorted(range(len(row)), key=lambda e: -row[e])[:top_k]
        favoured = sorted(range(len(row)), key=lambda e: (-counts[e], e))[: settings.experts]
        lift = [settings.strength * (e in favoured) * (t >= settings.after) for e in range(len(row))]
        if settings.unit == "share":
            row = [math.exp(score - max(row)) for score in row]
            row = [score / sum(row[e] for e in own) for score in row]
        found.append(sorted(range(len(row)), key=lambda e: -(row[e] + lift[e]))[:top_k])
        for e in own:
            counts[e] += 1
    return found


@pytest.mark.parametrize("settings", [STRONG, LOGITS], ids=["share", "logit"])
@pytest.mark.parametrize("family", KNOWN)
def test_the_choice_is_the_rule_and_the_weights_are_the_routers_own(tmp_path, family, settings):
    folder = save_checkpoint(tmp_path / "model", family)
    model, plain = resident(folder), resident(folder)
    make_sticky(model, settings)
    tokens = ids()
    chosen, weights, logits = routing(model, tokens)
    first_chosen, first_weights, first_logits = (found[0] for found in routing(plain, tokens))
    assert torch.equal(first_logits, logits[0])  # the first layer sees the same
    for layer_chosen, layer_logits in zip(chosen, logits, strict=True):
        by_rule = by_hand(layer_logits, layer_chosen.shape[1], settings)
        assert [sorted(row) for row in layer_chosen.tolist()] == [sorted(row) for row in by_rule]
    same = (chosen[0].sort().values == first_chosen.sort().values).all(1)
    assert same[: STRONG.after].all() and (~same).sum() > 5
    by_expert = [
        w[same].gather(1, c[same].argsort(1))
        for w, c in ((weights[0], chosen[0]), (first_weights, first_chosen))
    ]
    assert torch.equal(*by_expert)
    if family != "gemma4_text":  # whose experts have a factor each
        ratios = weights[0] / logits[0].float().softmax(-1).gather(1, chosen[0])
        assert torch.allclose(ratios, ratios[:, :1].expand_as(ratios), rtol=1e-4)  # not lifted


def sticky_pass(model):
    make_sticky(model, STRONG)
    model(ids())


@pytest.mark.parametrize("family", FAMILIES)
def test_whether_a_checkpoint_can_be_sticky_is_known_before_its_weights_are_read(tmp_path, family):
    checkpoint = Checkpoint(save_checkpoint(tmp_path / "model", family))
    assert not checkpoint.load_routers()
    assert can_be_sticky(checkpoint.model) == (family in KNOWN)


@pytest.mark.parametrize("family", FAMILIES)
def test_paged_equals_resident_or_the_family_is_refused_by_name(tmp_path, family, monkeypatch):
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    folder = save_checkpoint(tmp_path / "model", family)
    whole = resident(folder)
    if family not in KNOWN:
        with pytest.raises(melinoe.MelinoeError, match="sticky routing does not know the routers of"):
            sticky_pass(whole)  # when it is made so, or in its first pass where its routers need more
        return
    make_sticky(whole, STRONG)
    paged = melinoe.load(folder, slots=3, sticky=STRONG)
    assert torch.equal(paged(**batch(24)).logits, whole(**batch(24)).logits)
    for way in ("dynamic cache", "chunked prefill", "no cache"):
        assert generate(paged, way) == generate(whole, way)


def test_however_a_text_is_fed(sticky):
    tokens = ids()
    with torch.no_grad():
        whole = sticky(tokens).logits
        out = sticky(tokens[:, :10])  # its cache is made by the model
        parts, cache = [out.logits], out.past_key_values
        for start, end in [(10, 21), *((t, t + 1) for t in range(21, 40))]:
            parts.append(sticky(tokens[:, start:end], past_key_values=cache).logits)
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
        cache.crop(-15)  # what guessing does with tokens that were not right
        again = copy.deepcopy(cache)
        for one in (cache, again):
            assert torch.allclose(
                sticky(tokens[:, 25:], past_key_values=one).logits, whole[:, 25:], atol=1e-5
            )


def test_sequences_of_a_batch_and_padding_do_not_meet(sticky):
    long, short = ids(seed=1), ids(length=25, seed=2)
    with torch.no_grad():
        alone = sticky(long).logits, sticky(short).logits
        for side in ("left", "right"):
            start = 15 if side == "left" else 0
            both, mask = torch.cat([long, torch.zeros_like(long)]), torch.ones(2, 40, dtype=torch.long)
            mask[1] = 0
            both[1, start : start + 25], mask[1, start : start + 25] = short[0], 1
            found = sticky(both, attention_mask=mask).logits
            assert torch.allclose(found[0], alone[0][0], atol=1e-5)
            assert torch.allclose(found[1, start : start + 25], alone[1][0], atol=1e-5)


@pytest.mark.parametrize("way", ["prompt lookup", "assisted"])
def test_guessed_tokens_are_routed_as_decoded_ones(sticky, way):
    assert generate(sticky, way, assistant=sticky if way == "assisted" else None) == generate(
        sticky, "one prompt"
    )


def test_a_pass_that_broke_off_is_forgotten(sticky):
    tokens = ids()
    layers = moe_layers(sticky)

    def stop(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        whole = sticky(tokens).logits
        cache = DynamicCache(config=sticky.config)
        sticky(tokens[:, :20], past_key_values=cache)
        handle = layers[-1].experts.register_forward_pre_hook(stop)
        kept = copy.deepcopy(cache)  # the cache of attention is the caller's to restore
        with pytest.raises(KeyboardInterrupt):
            sticky(tokens[:, 20:30], past_key_values=cache)
        handle.remove()
        kept._melinoe_sticky_history = cache._melinoe_sticky_history
        assert torch.allclose(sticky(tokens[:, 20:], past_key_values=kept).logits, whole[:, 20:], atol=1e-5)


def test_a_first_pass_that_broke_off_is_forgotten_by_an_emptied_cache(sticky):
    tokens = ids()

    def stop(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        whole = sticky(tokens).logits
        cache = DynamicCache(config=sticky.config)
        handle = moe_layers(sticky)[-1].experts.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            sticky(tokens.flip(1), past_key_values=cache)
        handle.remove()
        cache.reset()
        assert torch.allclose(sticky(tokens, past_key_values=cache).logits, whole, atol=1e-5)


def test_an_emptied_cache_is_filled_anew_in_any_mode(sticky):
    """A history is kept with its cache, and torch does not let one mode's tensors be changed in another."""
    tokens, cache = ids(), DynamicCache(config=sticky.config)
    with torch.no_grad():
        whole = sticky(tokens).logits
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad):
        cache.reset()
        with mode():
            assert torch.allclose(sticky(tokens, past_key_values=cache).logits, whole, atol=1e-5)


def test_what_cannot_be_followed_is_refused(sticky, olmoe):
    with pytest.raises(melinoe.MelinoeError, match="use one beam"):
        generate(sticky, "beams")
    plain = resident(olmoe)
    cache = plain(ids()).past_key_values
    with pytest.raises(melinoe.MelinoeError, match="not filled with this sticky routing"):
        sticky(ids(), past_key_values=cache)
    with pytest.raises(melinoe.MelinoeError, match="cannot be copied"):
        copy.deepcopy(sticky)
    for wrong in (
        -1,
        1.1,
        "much",
        {"strength": 21},
        {"strength": 1, "unit": "nat"},
        {"strength": 1, "size": 3},
        {"strength": 1, "after": 0},
    ):
        with pytest.raises(melinoe.MelinoeError, match="not a stickiness") as refused:
            stickiness(wrong)
        assert "Stickiness(" not in str(refused.value)  # no name of Python's for who wrote --sticky


def test_off_is_off(olmoe):
    model, plain = resident(olmoe), resident(olmoe)
    make_sticky(model, STRONG)
    router = moe_layers(model)[0].router
    tokens = ids()
    assert not torch.equal(model(tokens).logits, plain(tokens).logits)
    assert not plain_copy(router)._forward_hooks and router._forward_hooks
    make_sticky(model, None)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert not hasattr(model.config, "melinoe_sticky") and not router._forward_hooks


def test_a_history_that_was_cut_is_the_one_that_never_went_on():
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(2, 2, 600, 8, generator=generator).topk(2).indices  # [L, B, T, K] of 8 experts
    valid = torch.rand(2, 600, generator=generator) > 0.2
    found = []
    for cuts in ((0, 600), (0, 3, 4, 300, 301, 600)):
        history = History(2, 2, 8, torch.device("cpu"))
        for start, end in pairwise(cuts):
            history.begin(valid[:, start:end], 2)
            for layer in range(2):
                history.add(layer, chosen[layer, :, start:end], valid[:, start:end])
            history.end(valid[:, start:end])
        history.cut(299)
        found.append(history)
    expected = torch.zeros(2, 2, 8, dtype=torch.int64)
    for layer in range(2):
        for row in range(2):
            for t in range(299):
                for expert in chosen[layer, row, t].tolist():
                    expected[layer, row, expert] += int(valid[row, t])
    for history in found:
        assert torch.equal(history.ranks_LBE, expected * 8 - torch.arange(8))
        assert history.tokens_B.tolist() == valid[:, :299].sum(1).tolist() and history.length == 299


@pytest.fixture(scope="module")
def tuned(olmoe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sticky")
    rows = [{"prompt": f"w{i} w{i + 1} w3", "completion": f"w{i + 2} w7 w{i}"} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    melinoe.tune(
        olmoe, folder / "rows.jsonl", folder / "adapter", sticky=0.5, slots=4, max_steps=2, rank=2,
        distill=0.5, batch_tokens=64, max_length=32, progress=False,
    )  # fmt: skip
    return folder


def test_a_model_is_as_sticky_as_it_was_tuned(olmoe, tuned, monkeypatch):
    monkeypatch.setenv("MELINOE_HOME", str(tuned / "home"))
    adapter = tuned / "adapter"
    assert json.loads((adapter / "melinoe.json").read_text())["sticky"] == {
        "strength": 0.5, "experts": 4, "after": 16, "unit": "share",
    }  # fmt: skip
    merge(olmoe, adapter, tuned / "merged")
    store = melinoe.convert(olmoe, tuned / "store", adapter=adapter, progress=False).folder
    expected = load_resident(olmoe, adapter)[0](ids()).logits
    assert torch.equal(melinoe.load(olmoe, adapter, slots=4)(ids()).logits, expected)
    rounded = load_resident(tuned / "merged")[0]
    assert rounded.config.melinoe_sticky["strength"] == 0.5
    assert torch.equal(
        melinoe.load(store, slots=4)(ids()).logits, melinoe.load(tuned / "merged", slots=4)(ids()).logits
    )
    by_transformers = AutoModelForCausalLM.from_pretrained(store)  # the same folder, the same answers
    assert torch.equal(by_transformers(ids()).logits, melinoe.load(store, slots=4)(ids()).logits)
    assert torch.allclose(rounded(ids()).logits, expected, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tuned / "merged").eval()  # what others see
    off = load_resident(tuned / "merged", sticky=0)[0]
    assert torch.allclose(plain(ids()).logits, off(ids()).logits, atol=1e-5)
    assert not torch.allclose(plain(ids()).logits, expected, atol=1e-2)
    other = melinoe.load(olmoe, adapter, slots=4, sticky=0.3).melinoe_sticky.settings
    assert other == Stickiness(0.3, 4, 16)


def test_what_names_no_unit_is_in_logits_as_before_there_were_shares(olmoe, tuned):
    card = tuned / "adapter" / "melinoe.json"
    text = card.read_text()
    try:
        old = {**json.loads(text), "sticky": {"strength": 1.5, "experts": 4, "after": 16}}
        card.write_text(json.dumps(old))
        model = load_resident(olmoe, tuned / "adapter")[0]
        assert model.melinoe_sticky.settings == Stickiness(1.5, 4, 16, "logit")
        model = load_resident(olmoe, tuned / "adapter", sticky=2.0)[0]
        assert model.melinoe_sticky.settings == Stickiness(2.0, 4, 16, "logit")
    finally:
        card.write_text(text)


def test_what_was_tuned_without_is_not_sticky_on_a_sticky_checkpoint(olmoe, tuned, tmp_path, monkeypatch):
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    sticky, adapter = tmp_path / "sticky", tmp_path / "adapter"
    merge(olmoe, tuned / "adapter", sticky)
    melinoe.tune(
        sticky, tuned / "rows.jsonl", adapter, slots=4, max_steps=2, rank=2, batch_tokens=64, max_length=32,
        progress=False,
    )  # fmt: skip
    assert json.loads((adapter / "melinoe.json").read_text())["sticky"] is None
    expected = load_resident(sticky, adapter, sticky=0)[0](ids()).logits
    assert torch.equal(load_resident(sticky, adapter)[0](ids()).logits, expected)
    assert torch.equal(melinoe.load(sticky, adapter, slots=4)(ids()).logits, expected)
    assert load_resident(sticky, adapter, sticky=1.0)[0].melinoe_sticky.settings == Stickiness(1.0)
    merge(sticky, adapter, tmp_path / "merged")
    store = melinoe.convert(sticky, tmp_path / "store", adapter=adapter, progress=False).folder
    for folder in (tmp_path / "merged", store):
        assert "melinoe_sticky" not in json.loads((folder / "config.json").read_text())
    card = json.loads((adapter / "melinoe.json").read_text())
    del card["sticky"]  # from before there was any: the checkpoint decides
    (adapter / "melinoe.json").write_text(json.dumps(card))
    assert load_resident(sticky, adapter)[0].melinoe_sticky.settings.strength == 0.5


def test_tuning_compares_with_the_base_as_it_was(olmoe, tuned):
    """base_nll is that of the base model without stickiness."""
    log = [json.loads(line) for line in (tuned / "adapter" / "losses.jsonl").read_text().splitlines()]
    melinoe.tune(
        olmoe, tuned / "rows.jsonl", tuned / "plain", slots=4, max_steps=2, rank=2, distill=0.5,
        batch_tokens=64, max_length=32, progress=False,
    )  # fmt: skip
    plain = [json.loads(line) for line in (tuned / "plain" / "losses.jsonl").read_text().splitlines()]
    assert [one["base_nll"] for one in log] == pytest.approx([one["base_nll"] for one in plain], abs=1e-6)
    assert log[0]["nll"] == pytest.approx(plain[0]["nll"], abs=1e-6)  # rows shorter than `after`


def test_a_trace_is_what_the_sticky_model_asks_for(olmoe, tuned):
    """Fewer loads for the same text, by the runtime's own policy."""
    rows = tuned / "long.jsonl"
    text = " ".join(f"w{i % 47}" for i in range(120))
    rows.write_text(json.dumps({"prompt": text[:60], "completion": text[60:]}) + "\n")
    loads = []
    for strength in (0.0, 0.8):
        recorded = trace(olmoe, rows, sticky=strength, progress=False)
        [result] = melinoe.simulate(recorded, "decay", 3)["results"]
        loads.append(result["loads_per_token"])
    assert loads[1] < 0.8 * loads[0]


def test_a_recorded_step_is_sticky(olmoe_store, olmoe):
    from melinoe.decoding.decoder import decoder_of
    from melinoe.decoding.loop import generate as replayed

    paged, whole = melinoe.load(olmoe_store, slots=3, sticky=STRONG), resident(olmoe)
    make_sticky(whole, STRONG)
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    prompt, found = ids(length=20), []
    for _ in range(2):  # recorded, and replayed from the start
        found.append(replayed(paged, prompt, **settings))
    assert decoder_of(paged).replays == 1 and not decoder_of(paged).why_eager
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], whole.generate(prompt, **settings))
    make_sticky(paged, None)
    make_sticky(whole, None)
    plain = whole.generate(prompt, **settings)
    assert torch.equal(replayed(paged, prompt, **settings), plain) and not torch.equal(plain, found[0])
