"""What the tap says of every family's routers, against what their experts really receive."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from families import FAMILIES, SCORE_KINDS, UNDECORATED, batch, save_checkpoint
from family_configs import FIELDS, exact_types
from melinoe.data.encoding import Encoded
from melinoe.experts.forward import use_melinoe_experts
from melinoe.measure.trace import read_routing
from melinoe.models.layers import experts_per_token, fingerprint, moe_layers
from melinoe.models.router_tap import RouterTap, requests, router_probabilities, score_kind
from melinoe.runtime.plan import plan


def opened(family, folder, dtype=torch.float32, **changes):
    source = save_checkpoint(folder, family, dtype, **changes)
    return AutoModelForCausalLM.from_pretrained(source).eval()


def listen(model, calls):
    """Appends (indices, weights) of every call of an experts module, from outside melinoe.

    llama4's experts get every token for every expert, scaled by a score that is 0 where it was not chosen;
    there we listen to the whole layer's router and read the choice off the scores that are not 0.
    """
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Llama4Router":

            def scores(_module, _inputs, output):
                chosen = output[0] > 0
                top_k = int(chosen.sum(-1)[0])
                assert bool((chosen.sum(-1) == top_k).all())
                indices = chosen.nonzero()[:, 1].view(-1, top_k)
                calls.append((indices, output[0].gather(1, indices)))

            module.register_forward_hook(scores)
        elif kind == "DbrxExperts" or (hasattr(module, "has_gate") and kind != "DbrxExpertGLU"):

            def received(_module, inputs, kwargs, kind=kind):
                named = [kwargs[key] for key in ("top_k_index", "top_k_weights") if key in kwargs]
                indices, weights = [*inputs[1:], *named]
                calls.append((indices, weights))

            if kind != "Llama4TextExperts":
                module.register_forward_pre_hook(received, with_kwargs=True)


def by_expert(indices, weights, num_experts):
    """[T, E]: each token's weight of each expert; the order within the top k does not matter."""
    dense = torch.zeros(len(indices), num_experts, dtype=weights.dtype)
    return dense.scatter_(1, indices, weights)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in exact_types()] + [(family, torch.bfloat16) for family in FAMILIES],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_the_tap_records_what_the_experts_receive(family, dtype, tmp_path):
    model, calls = opened(family, tmp_path / "model", dtype), []
    layers = moe_layers(model)
    listen(model, calls)
    with torch.no_grad(), RouterTap(layers) as tap:
        model(**batch())
    assert len(calls) == len(layers) == len(tap.records)
    top_k = experts_per_token(model)
    for layer, record, (indices, weights) in zip(layers, tap.records, calls, strict=True):
        asked = requests(record.indices, layer.num_experts)
        assert asked.shape == (18, layer.num_experts)
        assert torch.equal(asked.sum(1), torch.full((18,), float(top_k)))
        assert torch.equal(asked, requests(indices, layer.num_experts))
        heard = by_expert(indices, weights, layer.num_experts)
        assert torch.equal(by_expert(record.indices, record.weights, layer.num_experts), heard)
        assert record.logits.shape == asked.shape
        kind = score_kind(record)
        assert kind == SCORE_KINDS.get(family, "softmax")
        p = router_probabilities(record.logits, kind)
        assert p.dtype == torch.float32
        assert bool((p >= 0).all())
        assert torch.allclose(p.sum(1), torch.ones(18), atol=1e-4)


@pytest.mark.parametrize("family", exact_types())
def test_the_trace_holds_what_the_experts_receive(family, tmp_path):
    """melinoe.trace's reading, in batches that are padded on the right, one sequence at a time as witness."""
    model = opened(family, tmp_path / "model")
    generator = np.random.default_rng(3)
    rows = [Encoded(generator.integers(3, 50, length).tolist(), ((3, length),)) for length in (12, 7, 9, 12)]
    traced = read_routing(model, rows, batch_size=2, progress=False)
    calls = []
    listen(model, calls)
    num_layers, num_experts = len(moe_layers(model)), moe_layers(model)[0].num_experts
    for row, indices in zip(rows, traced, strict=True):
        calls.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([row.ids[:-1]]))
        assert indices.shape == (len(row.ids) - 1, num_layers, experts_per_token(model))
        for layer in range(num_layers):
            witness = requests(calls[layer][0], num_experts)
            assert torch.equal(requests(torch.from_numpy(indices[:, layer]).long(), num_experts), witness)


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe", "minimax_m2", "lfm2_moe"]
)
def test_choices_are_not_recomputed_from_logits(family, tmp_path):
    """Groups and correction biases move the choice: the largest logits would be the wrong experts."""
    model = opened(family, tmp_path / "model")
    with torch.no_grad(), RouterTap(moe_layers(model)) as tap:
        model(**batch())
    record = tap.records[0]
    largest = record.logits.topk(record.indices.shape[1]).indices
    assert not torch.equal(requests(record.indices, 8), requests(largest, 8))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "llama4_text", "dbrx", "glm4_moe"])
def test_kind_of_a_router_that_takes_one_expert(family, tmp_path, monkeypatch):
    """With one expert per token there are no ratios: llama4's own checkpoints are of that kind."""
    fields = FIELDS.get(family, {})
    one = {"num_experts_per_tok": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0}
    if family == "dbrx":
        one = {"ffn_config": {**fields["ffn_config"], "moe_top_k": 1, "moe_normalize_expert_weights": None}}
    if family in ("llama4_text", "mixtral"):
        one = {"num_experts_per_tok": 1}
    monkeypatch.setitem(FIELDS, family, {**fields, **one})
    model = opened(family, tmp_path / "model")
    with torch.no_grad(), RouterTap(moe_layers(model)) as tap:
        model(**batch())
    assert {score_kind(record) for record in tap.records} == {SCORE_KINDS.get(family, "softmax")}


def test_a_layer_takes_no_other_layers_router(tmp_path):
    """deepseek_v4's first layers have routers that transformers does not record, its later ones others."""
    model = opened("deepseek_v4", tmp_path / "model")
    names = [(type(layer.router).__name__, layer.router_name) for layer in moe_layers(model)]
    assert names == [
        ("DeepseekV4HashRouter", "model.layers.0.mlp.gate"),
        ("DeepseekV4TopKRouter", "model.layers.1.mlp.gate"),
    ]
    model.model.layers[0].mlp.gate = torch.nn.Identity()  # as a router of a name that nobody can know
    with pytest.raises(ValueError, match=r"no router found for model.layers.0.mlp.experts"):
        moe_layers(model)


def test_a_table_of_experts_by_token_is_part_of_the_fingerprint(tmp_path):
    model = opened("deepseek_v4", tmp_path / "model")
    before = fingerprint(model)
    table = model.model.layers[0].mlp.gate.tid2eid
    table[7] = table[7].flip(0)
    assert fingerprint(model) != before


def test_a_router_of_another_form_is_refused(tmp_path):
    model = opened("mixtral", tmp_path / "model")
    layer = moe_layers(model)[0]
    for output in (torch.zeros(4, 8), (torch.zeros(4, 8), torch.zeros(4, 2))):
        with pytest.raises(ValueError, match=r"does not return what the tap can read"):
            layer.routing_of(output)


def test_probabilities_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, float(np.log(3))]])
    assert torch.allclose(router_probabilities(logits, "softmax"), torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    # sigmoid: 1/2 and 3/4, divided by their sum
    assert torch.allclose(router_probabilities(logits, "sigmoid"), torch.tensor([[0.5, 0.5], [0.4, 0.6]]))
    # square roots of softplus: 1 and 2, divided by their sum
    logits = torch.tensor([[1.0, 4.0]]).expm1().log()
    expected = torch.tensor([[1 / 3, 2 / 3]])
    assert torch.allclose(router_probabilities(logits, "sqrtsoftplus"), expected)
    given = torch.tensor([[0.2, 0.8]])
    assert torch.equal(router_probabilities(given, "probability"), given)
    assert requests(torch.tensor([[1, 2]]), 2).tolist() == [[0.0, 1.0]]  # 2 belongs to another process


@pytest.mark.parametrize("family", UNDECORATED)
def test_decorating_an_undecorated_model_changes_nothing(family, tmp_path):
    """Until it is switched to our function, the model computes and saves as transformers wrote it."""
    model = opened(family, tmp_path / "model")
    with torch.no_grad():
        before = model(**batch()).logits
        moe_layers(model)
        assert torch.equal(model(**batch()).logits, before)
        copied = copy.deepcopy(model)
        use_melinoe_experts(copied)
        assert any("forward" in vars(module) for module in copied.modules())
        assert not any("forward" in vars(module) for module in model.modules())
        assert torch.allclose(copied(**batch()).logits, before, atol=1e-5)
        for parameter in copied.parameters():  # the copy's experts are the copy's, not the original's
            parameter.zero_()
        assert not copied(**batch()).logits.any()
        assert torch.equal(model(**batch()).logits, before)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in opened(family, tmp_path / "again").state_dict().items()
    }


@pytest.mark.parametrize("family", UNDECORATED)
def test_plan_of_an_undecorated_model(family, tmp_path):
    result = plan(save_checkpoint(tmp_path / "model", family), slots=2)
    assert result["num_experts"] == 8
    assert result["records_per_token"] == 4
    assert result["record_bytes"] == 12288  # 3 * 24 * 32 float32, in pages of 4096 bytes
