"""Every family that can be paged can be tuned: a few steps each, then the adapter's way back."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import FAMILIES, save_checkpoint
from family_configs import exact_types
from melinoe.adapters.merge import merge
from melinoe.adapters.peft_folder import apply_adapter
from melinoe.errors import MelinoeError
from melinoe.experts.low_rank import projection_parameter
from melinoe.models.layers import moe_layers
from melinoe.tuning.trainer import LocalityTrainer
from melinoe.tuning.tune import tune

NOT_TUNABLE = ("dbrx",)  # all experts of a layer in one flat matrix: PEFT cannot name one expert's factors
IDS = torch.arange(3, 35).reshape(2, 16)
STEPS = {"batch_tokens": 256, "max_length": 32, "rank": 2, "warmup": 0.0, "progress": False}
STEPS |= {"learning_rate": 0.02, "router_learning_rate": 0.02, "lambda_cs": 0.3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {"prompt": f"w{i} w{i + 1} w{3 * i}", "completion": f"w{i + 2} w{i + 3} w{2 * i} w5"}
        for i in range(12)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def trained(monkeypatch):
    """What tune trained, and for every router the largest gradient that reached it."""
    seen = {}
    original = LocalityTrainer.train

    def train(self, **options):
        seen["model"], seen["gradients"] = self.model, {}
        for layer in self.layers:
            for name, parameter in layer.router.named_parameters():

                def reached(gradient, key=f"{layer.router_name}.{name}"):
                    largest = max(seen["gradients"].get(key, 0.0), float(gradient.abs().max()))
                    seen["gradients"][key] = largest

                parameter.register_hook(reached)
        return original(self, **options)

    monkeypatch.setattr(LocalityTrainer, "train", train)
    return seen


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def losses(folder):
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", [family for family in exact_types() if family not in NOT_TUNABLE])
def test_a_few_steps_of_every_family(family, tmp_path, data, trained):
    base = save_checkpoint(tmp_path / "base", family)
    steps, fall = (8, 0.97) if family in FAMILIES else (5, 0.99)
    tune(base, data, tmp_path / "adapter", **STEPS, max_steps=steps)
    log = losses(tmp_path / "adapter")
    assert log[-1]["nll"] < fall * log[0]["nll"], [record["nll"] for record in log]
    before, applied = load(base), load(base)
    layers = moe_layers(before)
    assert len(trained["gradients"]) >= len(layers)
    assert all(gradient > 0 for gradient in trained["gradients"].values()), trained["gradients"]
    for layer in moe_layers(trained["model"]):
        assert not layer.router.training  # sparsemixer draws noise in training mode

    # reloaded: the routers and factors that were trained, bit for bit
    apply_adapter(applied, tmp_path / "adapter")
    for mine, theirs in zip(moe_layers(trained["model"]), moe_layers(applied), strict=True):
        for name, value in mine.router.state_dict().items():
            assert torch.equal(value, theirs.router.state_dict()[name]), name
        for name, value in mine.experts.low_rank.state_dict().items():
            assert torch.equal(value, theirs.experts.low_rank.state_dict()[name]), name

    # merged: W + (alpha / r) B A in the experts, the routers, and nothing else
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    expected = dict(before.state_dict())
    for layer in moe_layers(applied):
        for projection in ("up", "down"):
            name = f"{layer.experts_name}.{projection_parameter(layer.experts, projection)}"
            a, b = layer.experts.low_rank.factors(projection)
            added = layer.experts.low_rank.scale * (b @ a)
            expected[name] = expected[name] + (added.mT if layer.experts.is_transposed else added)
        for name, value in layer.router.state_dict().items():
            expected[f"{layer.router_name}.{name}"] = value
    found = merged.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-6 * float(value.abs().max()) if "experts" in name else 0.0
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0.0, msg=name)
    reference = logits(merged)
    for model in (applied, trained["model"].eval()):
        tolerance = 2e-5 * float(reference.abs().max())
        torch.testing.assert_close(logits(model), reference, atol=tolerance, rtol=0.0)
    assert (reference - logits(before)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])  # both keep their weights transposed
def test_peft_opens_the_adapter(family, tmp_path, data):
    peft = pytest.importorskip("peft")
    base = save_checkpoint(tmp_path / "base", family)
    tune(base, data, tmp_path / "adapter", **STEPS, max_steps=8)
    ours = load(base)
    apply_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_tuned_is_refused(tmp_path, data):
    base = save_checkpoint(tmp_path / "base", "dbrx")
    with pytest.raises(MelinoeError, match="not tuned"):
        tune(base, data, tmp_path / "adapter", **STEPS, max_steps=8)
    assert not (tmp_path / "adapter").exists()


def test_a_family_that_looks_at_values_is_counted_and_tuned_in_a_budget(tmp_path, data):
    """What qwen4_exp attends to hangs on values, and a count has none: it takes all for seen."""
    base = save_checkpoint(tmp_path / "base", "qwen4_exp_text")
    found = tune(base, data, tmp_path / "paged", **STEPS, max_steps=1, memory="1GiB")
    assert found["paged"]["loads"] > 0
    assert found["total"] == tune(base, data, tmp_path / "whole", **STEPS, max_steps=1)["total"]
