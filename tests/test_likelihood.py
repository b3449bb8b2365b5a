"""The quality term: which positions count, and the base model inside the tuned one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from interrupting import interrupted_at
from melinoe.adapters.peft_folder import apply_adapter
from melinoe.losses.likelihood import next_token_positions
from melinoe.measure.trace import trace
from melinoe.models.layers import moe_layers
from melinoe.routing.policies import DECODE
from melinoe.tuning.model import prepare_model
from melinoe.tuning.objectives import OBJECTIVES
from melinoe.tuning.settings import TuneSettings
from melinoe.tuning.step.base_model import as_base
from melinoe.tuning.step.losses import StepLosses
from melinoe.tuning.tune import tune
from text_model import model_and_tokenizer, rows

SHORT = {
    "max_steps": 8,
    "batch_tokens": 256,
    "max_length": 64,
    "rank": 4,
    "progress": False,
    "max_grad_norm": 0.0,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model, tokenizer = copy.deepcopy(model_and_tokenizer())
    with torch.no_grad():
        for layer in moe_layers(model):  # experts that matter: as initialised they add next to nothing
            for parameter in layer.experts.parameters():
                parameter *= 20
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    texts = [{"prompt": row.messages[0]["content"], "completion": row.completion} for row in rows()]
    file.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return file


@pytest.fixture
def prepared(base):
    """(model, layers, frozen routers) with routers and factors moved away from the start."""
    model, layers = prepare_model(base, TuneSettings(rank=4), "cpu")
    frozen = [copy.deepcopy(layer.router) for layer in layers]
    with torch.no_grad():
        for layer in layers:
            for parameter in (*layer.router.parameters(), *layer.experts.low_rank.parameters()):
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval(), layers, frozen


def batch(model):
    ids = torch.randint(3, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    answers = mask.bool()
    answers[0, :4] = answers[1, :3] = False
    return {"input_ids": ids, "attention_mask": mask, "answers": answers}


def test_positions_by_hand():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]])
    answers = mask.bool() & torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    follows, completion = next_token_positions(mask, answers)
    assert follows.tolist() == [
        [True, True, True, False],
        [True, True, False, False],
        [False, True, True, False],
    ]
    assert completion.tolist() == [
        [False, True, True, False],
        [False, True, False, False],
        [False, False, True, False],
    ]


def test_the_base_model_inside_the_tuned_one(base, prepared):
    model, layers, frozen = prepared
    inputs = batch(model)
    untouched = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(inputs["input_ids"]).logits
        with as_base(model, layers, frozen):
            torch.testing.assert_close(
                model(inputs["input_ids"]).logits, untouched(inputs["input_ids"]).logits
            )
        assert torch.equal(model(inputs["input_ids"]).logits, before)
        with pytest.raises(RuntimeError), as_base(model, layers, frozen):
            raise RuntimeError
        assert torch.equal(model(inputs["input_ids"]).logits, before)
    assert list(model.state_dict()) == names
    assert not torch.allclose(before, untouched(inputs["input_ids"]).logits, atol=1e-2)


@pytest.mark.parametrize("on_prompt", [False, True])
def test_divergence_equals_two_models(base, prepared, on_prompt):
    model, layers, frozen = prepared
    inputs = batch(model)
    losses = StepLosses(model, layers, TuneSettings(distill=0.5, distill_prompt=on_prompt))
    losses.base_routers = frozen
    found, _ = losses.quality(model, inputs)
    untouched = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    nll = base_nll = divergence = 0.0
    for row, (length, prompt) in enumerate(((9, 4), (6, 3))):
        ids = inputs["input_ids"][row : row + 1, :length]
        with torch.no_grad():
            tuned, old = model(ids).logits[0].log_softmax(-1), untouched(ids).logits[0].log_softmax(-1)
        for position in range(length - 1):
            if position + 1 >= prompt:
                nll -= float(tuned[position, ids[0, position + 1]])
                base_nll -= float(old[position, ids[0, position + 1]])
            if on_prompt or position + 1 >= prompt:
                divergence += float((old[position].exp() * (old[position] - tuned[position])).sum())
    assert found.tokens == (9 - 4) + (6 - 3)
    assert found.divergence_tokens == (8 + 5 if on_prompt else found.tokens)
    assert float(found.nll.detach()) == pytest.approx(nll, rel=1e-4)
    assert float(found.base_nll) == pytest.approx(base_nll, rel=1e-4)
    assert float(found.divergence.detach()) == pytest.approx(divergence, rel=1e-3)
    assert float(found.divergence.detach()) > 0.05


def log_of(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_distilling_starts_at_the_base(base, data, tmp_path):
    tune(base, data, tmp_path / "a", distill=1.0, **SHORT)
    log = log_of(tmp_path / "a")
    assert log[0]["divergence"] == pytest.approx(0.0, abs=1e-5)
    assert log[0]["base_nll"] == pytest.approx(log[0]["nll"], rel=1e-5)
    assert log[-1]["divergence"] > 0


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_every_objective_raises_the_hit_rate(base, data, tmp_path, objective):
    """More hits than the control's, on the last steps of a short and steep run."""
    steep = SHORT | {"max_steps": 40, "learning_rate": 3e-3, "router_learning_rate": 2e-2, "slots": 2}
    tune(base, data, tmp_path / "tuned", objective=objective, lambda_cs=5.0, lambda_rm=0.0, **steep)
    tune(base, data, tmp_path / "control", objective=objective, lambda_cs=0.0, lambda_rm=0.0, **steep)
    hits = [sum(line["hit_rate"] for line in log_of(tmp_path / name)[-10:]) for name in ("tuned", "control")]
    assert hits[0] > 1.05 * hits[1], hits


def test_the_rival_moves_routers_alone(base, data, tmp_path):
    tune(base, data, tmp_path / "a", objective="remoe", **SHORT)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    routers = [layer.router.weight.clone() for layer in moe_layers(model)]
    apply_adapter(model, tmp_path / "a")
    for old, layer in zip(routers, moe_layers(model), strict=True):
        assert not torch.equal(old, layer.router.weight)
        assert float(layer.experts.low_rank.up_B.abs().max()) == 0.0


def test_a_price_spreads_the_load(base, data, tmp_path):
    """With a price and nothing else, experts that were asked for often are asked for less."""
    steep = SHORT | {"max_steps": 80, "learning_rate": 1e-3, "router_learning_rate": 2e-2, "cooldown": 0.0}

    def unevenness(name, balance):
        tune(base, data, tmp_path / name, lambda_cs=5.0, lambda_rm=0.0, balance=balance, **steep)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        apply_adapter(model, tmp_path / name)
        recorded = trace((model.eval(), model_and_tokenizer()[1]), data, progress=False)
        load = torch.from_numpy(recorded.request_counts(DECODE).sum(0)).float()
        return float((load.std(-1) / load.mean(-1)).mean())

    assert unevenness("priced", 2.0) < 0.8 * unevenness("free", 0.0)


def test_an_aim_is_steered_to(base, data, tmp_path):
    steep = SHORT | {"max_steps": 150, "learning_rate": 3e-3, "router_learning_rate": 5e-3, "slots": 2}
    low = tune(base, data, tmp_path / "low", target_hit_rate=0.2, **steep)
    high = tune(base, data, tmp_path / "high", target_hit_rate=0.9, **steep)
    assert high["hit_rate"] > low["hit_rate"] + 0.05
    factors = [log_of(tmp_path / name)[-1]["weight_factor"] for name in ("low", "high")]
    assert factors[1] > factors[0]


def test_an_interrupted_aim_resumes_where_it_was(base, data, tmp_path):
    settings = SHORT | {"checkpoint_steps": 2, "max_quality_loss": 0.01, "distill": 0.5}
    tune(base, data, tmp_path / "whole", **settings)
    with interrupted_at(6):
        tune(base, data, tmp_path / "cut", **settings)
    tune(base, data, tmp_path / "cut", **settings)
    strip = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in log_of(tmp_path / name)]
        for name in ("cut", "whole")
    ]
    assert strip[0] == strip[1]
    assert log_of(tmp_path / "cut")[-1]["weight_factor"] != 1.0
