"""On a GPU: paged equals resident to the bit, in every family and by every way to generate (make gpu)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import melinoe
from families import FAMILIES, UNDECORATED, WAYS, batch, generate, save_checkpoint
from melinoe.experts.forward import use_melinoe_experts

pytestmark = pytest.mark.gpu


def on_gpu(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


def resident(source):
    """Every expert in the device's memory, on our experts function."""
    model = AutoModelForCausalLM.from_pretrained(source, device_map={"": "cuda"}).eval()
    use_melinoe_experts(model)
    return model.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_paged_equals_resident(family, dtype, tmp_path):
    source = save_checkpoint(tmp_path / "model", family, dtype)
    inputs = on_gpu(batch())
    alone = {name: value[:1] for name, value in inputs.items()}
    length = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    own = resident(source)
    with torch.no_grad():
        reference, first = own(**inputs).logits, own(alone["input_ids"][:, :1]).logits
    tokens, tokens_alone = own.generate(**inputs, **length), own.generate(**alone, **length)
    if dtype == torch.float32:
        other = {} if family in UNDECORATED else {"experts_implementation": "eager"}
        stock = AutoModelForCausalLM.from_pretrained(source, device_map={"": "cuda"}, **other).eval()
        with torch.no_grad():
            expected = stock(**inputs).logits
        assert (reference - expected).abs().max() < 1e-4 * expected.abs().max().clamp_min(1)
    melinoe.convert(source, tmp_path / "store", progress=False)
    for slots, policy in [(8, "decay"), (3, "decay"), (1, "lfu"), (0, "lru")]:
        model = melinoe.load(tmp_path / "store", slots=slots, policy=policy, device="cuda")
        assert torch.equal(model(**inputs).logits, reference), (slots, policy)
        assert torch.equal(model(alone["input_ids"][:, :1]).logits, first), (slots, policy)
        assert torch.equal(model.generate(**inputs, **length), tokens), (slots, policy)
        assert torch.equal(model.generate(**alone, **length), tokens_alone), (slots, policy)


@pytest.mark.parametrize("slots", [8, 3, 0])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate_equal_resident(olmoe, olmoe_store, tmp_path, way, slots):
    other = resident(save_checkpoint(tmp_path / "assistant", "olmoe", seed=1))
    expected = generate(resident(olmoe), way, other)
    paged = melinoe.load(olmoe_store, slots=slots, device="cuda")
    assert generate(paged, way, other) == expected
