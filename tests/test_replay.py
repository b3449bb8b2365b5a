"""One policy for the device and for the simulator: a trace replays to the same hits, misses, evictions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import melinoe
from melinoe.models.layers import fingerprint, moe_layers
from melinoe.models.router_tap import RouterTap
from melinoe.routing.policies import Strength
from melinoe.routing.simulate import simulate
from melinoe.routing.trace import from_sequences
from melinoe.runtime.load import reset_slots

PROMPTS = [[5, 9, 12, 30, 7], [44, 3, 3, 8], [20, 21, 22, 23, 24, 25, 26, 27]]


@pytest.mark.parametrize("carry_over", [False, True])
@pytest.mark.parametrize(
    ("policy", "slots"), [("decay", 4), ("lru", 3), ("lfu", 5), ("decay", 0), ("decay", 8)]
)
def test_device_and_simulator_agree(olmoe, olmoe_store, policy, slots, carry_over):
    stock = AutoModelForCausalLM.from_pretrained(olmoe).eval()
    model = melinoe.load(olmoe_store, slots=slots, policy=policy)
    sequences, indices = [], []
    for prompt in PROMPTS:
        if not carry_over:
            reset_slots(model)
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=15, min_new_tokens=15, do_sample=False
        )[0]
        sequences.append(tokens.tolist())
        with RouterTap(moe_layers(stock)) as tap, torch.no_grad():
            stock(tokens[None])
        indices.append(tap.indices().transpose(0, 1).numpy())
    trace = from_sequences(indices, sequences, [len(p) for p in PROMPTS], 8, fingerprint=fingerprint(stock))
    [expected] = simulate(trace, policy, slots, carry_over=carry_over)["results"]
    counted = melinoe.stats(model)
    assert counted.decode_tokens == expected["num_tokens"] == 14 * len(PROMPTS)
    assert counted.hit_rate == pytest.approx(expected["hit_rate"])
    assert counted.decode_loads == pytest.approx(expected["loads_per_token"] * expected["num_tokens"])
    assert counted.prefill_loads == pytest.approx(expected["prefill_loads_per_sequence"] * len(PROMPTS))
    assert counted.evictions == expected["evictions"]


def test_prediction_is_read_once_and_counted(olmoe_store):
    """Predicted experts that the prompt did not touch are preloaded; bytes add up; nothing is read twice."""
    model = melinoe.load(olmoe_store, slots=4)
    paged = model.melinoe_paged
    scores = np.zeros((2, 8))
    scores[:, [2, 6]] = 1.0
    paged.predictor = SimpleNamespace(predict=lambda prompt: (scores, Strength(200.0)))
    reads = []
    original = paged.pager.reader.read
    paged.pager.reader.read = lambda layer, expert, memory: (
        reads.append((layer, expert)) or original(layer, expert, memory)
    )
    model(torch.tensor([[5]]))
    for layer in range(2):
        assert {2, 6} <= paged.pager.policy.resident[layer]
        experts = [expert for at, expert in reads if at == layer]
        assert len(experts) == len(set(experts))
    counted = melinoe.stats(model)
    assert counted.preload_loads + counted.prefill_loads == len(reads)
    record = paged.pager.store.max_record_bytes
    paged.pager.reset()
    assert paged.pager.reader.bytes_read == len(reads) * record
