"""When things are done: one synchronisation per layer, hits while misses are read, nothing read twice."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode

import melinoe
from families import batch
from melinoe.experts import forward
from melinoe.paging.disk_reader import DiskReader
from melinoe.paging.weights_file import WeightsFile
from melinoe.routing.policies import DECODE
from melinoe.runtime.generation import stream_generate
from melinoe.runtime.load import load_tokenizer

# what waits for a device: values that the host must have before it can go on (numpy() refuses device memory)
SYNCHRONISES = {"cpu", "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique"}


class Synchronisations(TorchFunctionMode):
    """Counts the calls that would wait for a device, had the tensors been on one."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in SYNCHRONISES:
            self.count[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [1, 11], ids=["decode", "prefill"])
@pytest.mark.parametrize("slots", [0, 3, 8])
def test_one_synchronisation_per_layer(olmoe_store, slots, tokens):
    model = melinoe.load(olmoe_store, slots=slots)
    module = model.model.layers[0].mlp.experts
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, 32, generator=generator)
        index = torch.rand(tokens, 8, generator=generator).topk(2).indices
        with Synchronisations() as found:
            forward.melinoe_experts(module, hidden, index, torch.rand(tokens, 2, generator=generator))
        assert found.count == {"cpu": 1}


def test_hits_are_computed_while_misses_are_read(olmoe_store, monkeypatch):
    """No read ends before the last hit has been computed, and all reads have been asked for by then."""
    model = melinoe.load(olmoe_store, slots=8)
    model(input_ids=torch.tensor([[5]]))  # two experts of each layer are in slots now
    resident = [set(one) for one in model.melinoe_paged.pager.policy.resident]
    served, asked, gate = [], [], threading.Event()
    real_output, real_start, real_read = forward.expert_output, DiskReader.read, WeightsFile.read

    def output(module, hidden, weights, expert):
        served.append((int(module.melinoe_layer), expert))
        layer = served[-1][0]
        hits_left = resident[layer] - {e for at, e in served if at == layer}
        if not hits_left:
            gate.set()
        return real_output(module, hidden, weights, expert)

    def start(self, layer, expert, destination):
        asked.append((layer, expert))
        return real_start(self, layer, expert, destination)

    def read(self, destination, offset):
        assert gate.wait(20), "a hit waits for a read"
        real_read(self, destination, offset)

    monkeypatch.setattr(forward, "expert_output", output)
    monkeypatch.setattr(DiskReader, "read", start)
    monkeypatch.setattr(WeightsFile, "read", read)
    for index, layer in enumerate(model.model.layers):
        gate.clear()
        served.clear()
        asked.clear()
        hidden = torch.randn(12, 32, generator=torch.Generator().manual_seed(index))
        index_TK = torch.stack([torch.arange(8).roll(-shift)[:2] for shift in range(12)])
        forward.melinoe_experts(layer.mlp.experts, hidden, index_TK, torch.ones(12, 2))
        assert {expert for _, expert in served[: len(resident[index])]} == resident[index]
        assert len(served) == 8
        assert {expert for _, expert in asked} == set(range(8)) - resident[index]


@pytest.mark.parametrize("slots", [0, 1, 3, 8])
def test_a_prompt_reads_an_expert_at_most_once(olmoe_store, monkeypatch, slots):
    """In each call; and what a prompt has left in the slots is not read again for the first token."""
    model = melinoe.load(olmoe_store, slots=slots)
    reads, real = Counter(), DiskReader.read

    def read(self, layer, expert, destination):
        reads[layer, expert] += 1
        return real(self, layer, expert, destination)

    monkeypatch.setattr(DiskReader, "read", read)
    for seed in range(3):
        before = [set(one) for one in model.melinoe_paged.pager.policy.resident]
        reads.clear()
        model(**batch(seed=seed))
        assert reads or slots == 8
        assert set(reads.values()) <= {1}
        assert not [(layer, e) for layer, e in reads if e in before[layer]]
        assert all(len(one) >= min(slots, 5) for one in model.melinoe_paged.pager.policy.resident)


def test_long_prompts_go_through_in_chunks(tiny_store, monkeypatch):
    """The work space holds what the budget says; every chunk is a prefill, and tokens are the same."""
    from melinoe.runtime import division

    tokenizer = load_tokenizer("tiny")
    prompt = tokenizer("sort 31,58,18,28,44,12,9,77")["input_ids"]
    model = melinoe.load(tiny_store, slots=8)
    settings = {"max_new_tokens": 12, "ignore_eos": True}
    expected = [piece.token for piece in stream_generate(model, tokenizer, prompt, **settings)]
    monkeypatch.setattr(division, "PREFILL_CHUNK", 7)
    calls, real = [], model.melinoe_paged.pager.policy.request

    def request(layer, call):
        if layer == 0:
            calls.append((len(call.indices), call.phase))
        return real(layer, call)

    monkeypatch.setattr(model.melinoe_paged.pager.policy, "request", request)
    found = [piece.token for piece in stream_generate(model, tokenizer, prompt, **settings)]
    assert found == expected
    prefill = [length for length, phase in calls if phase != DECODE]
    assert len(prefill) > 2
    assert max(prefill) == 7
    assert sum(length for length, _ in calls) == len(prompt) + 11
