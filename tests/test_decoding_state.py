"""Whatever is changed between two generations is seen by the second: no step of the model as it was."""

from __future__ import annotations

import gc
import sys
import types
import weakref

import peft
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from melinoe.decoding import loop
from melinoe.decoding.decoder import decoder_of
from test_decoding_cache import made, prompt, settings

TOKENS = 10


def ours(model):
    return loop.generate(model, prompt(), **settings(TOKENS))


def stock(model):
    return model.generate(prompt(), **settings(TOKENS))


class Scaled(torch.nn.Module):
    """As an adapter's layer: what is active and how much of it stand in containers."""

    def __init__(self, base):
        super().__init__()
        self.base, self.active, self.scale = base, ["a"], {"a": 1.0, "b": -1.0}
        self.among = {1}

    def forward(self, x):
        return self.base(x) * self.scale[self.active[0]] * len(self.among)


def with_layer():
    model = made()
    attention = model.model.layers[0].self_attn
    attention.o_proj = Scaled(attention.o_proj)
    return model, attention.o_proj


def in_a_list(layer, _model, _monkeypatch):
    layer.active[0] = "b"


def another_list(layer, _model, _monkeypatch):
    layer.active = ["b"]


def in_a_dict(layer, _model, _monkeypatch):
    layer.scale["a"] = 0.0


def in_a_set(layer, _model, _monkeypatch):
    layer.among.add(2)


def a_forward_of_one_module(_layer, model, _monkeypatch):
    norm = model.model.norm
    norm.forward = lambda x: type(norm).forward(norm, x) * 0


def a_method_of_one_module(_layer, model, _monkeypatch):
    model.model.norm.forward = types.MethodType(lambda self, x: -x, model.model.norm)


def a_forward_of_a_class(_layer, model, monkeypatch):
    kind = type(model.model.norm)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: -forward(self, x))


def attention_of_a_name(_layer, _model, monkeypatch):
    def other(module, query, key, value, mask, **more):
        found = torch.nn.functional.scaled_dot_product_attention(query, key, -value, is_causal=False)
        return found.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", other)


def a_function_of_its_file(_layer, model, monkeypatch):
    file = sys.modules[type(model).__module__]
    monkeypatch.setattr(file, "apply_rotary_pos_emb", lambda q, k, *more, **named: (q, k))


@pytest.mark.parametrize(
    "change",
    [
        in_a_list, another_list, in_a_dict, in_a_set, a_forward_of_one_module, a_method_of_one_module,
        a_forward_of_a_class, attention_of_a_name, a_function_of_its_file,
    ],
)  # fmt: skip
def test_what_changes_is_seen(change, monkeypatch):
    model, layer = with_layer()
    before = ours(model)
    assert torch.equal(before, stock(model)) and decoder_of(model).replays == 1
    change(layer, model, monkeypatch)
    expected = stock(model)
    assert not torch.equal(expected, before), "it changes nothing, so nothing is tested"
    assert torch.equal(ours(model), expected)


def test_peft_adapters_take_turns():
    model = made()
    for name in "ab":
        torch.manual_seed(ord(name))
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        model.add_adapter(lora, adapter_name=name)
    model.eval()
    said = {}
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        said[name] = stock(model)
        assert torch.equal(ours(model), said[name])
    assert not torch.equal(said["a"], said["b"])
    layer = model.model.layers[0].self_attn.o_proj
    layer.scaling["a"] *= -3
    assert torch.equal(ours(model), stock(model))


def test_what_stays_is_not_recorded_again_and_nothing_is_kept_alive():
    model = made()
    model.looks = model.model.norm.forward  # a bound method leads back to the model
    ours(model)
    steps = decoder_of(model).steps
    for _ in range(3):
        ours(model)
    assert decoder_of(model).steps[0] is steps[0]
    gone = weakref.ref(model)
    del model, steps
    gc.collect()
    assert gone() is None
