"""What a model computes with is counted the same whether torch works out each shape or equal ones once."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import FAMILIES, config
from melinoe.runtime import work_space as module
from melinoe.runtime.known_shapes import KnownShapes
from melinoe.runtime.work_space import twin, work_space


class Never(KnownShapes):
    """Leaves everything to torch."""

    def of(self, func, args, kwargs):
        self.asked += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_is_that_of_torch(family, monkeypatch):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(family), dtype=torch.bfloat16).eval()
    found = work_space(twin(model), 2, 40, 64)
    monkeypatch.setattr(module, "KnownShapes", Never)
    assert found == work_space(twin(model), 2, 40, 64)


def test_more_layers_of_a_kind_ask_torch_for_no_more_new_tensors(monkeypatch):
    made: list[KnownShapes] = []

    class Kept(KnownShapes):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(module, "KnownShapes", Kept)
    known, calls = [], []
    for layers in (2, 6):
        deep = config("qwen3_moe")
        deep.num_hidden_layers, deep.layer_types = layers, None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(deep)
        made.clear()
        work_space(model, 1, 32, 32)
        [shapes] = made
        known.append(sum(found is not None for found in shapes._known.values()))
        calls.append(shapes.asked)
    assert known[0] == known[1] > 10
    assert calls[1] < 3 * calls[0]  # views and writes are asked for in each layer, products are not


def test_only_new_tensors_are_known():
    shapes, aten = KnownShapes(), torch.ops.aten
    one = torch.empty(4, 6, device="meta")
    for _ in range(2):
        assert shapes.of(aten.mul.Tensor, (one, one), {}).shape == (4, 6)
    assert shapes.asked == 1
    for func, args in ((aten.t.default, (one,)), (aten.mul_.Tensor, (one, 2)), (aten.detach.default, (one,))):
        for _ in range(2):
            found = shapes.of(func, args, {})
            assert found.untyped_storage()._cdata == one.untyped_storage()._cdata
    assert shapes.asked == 7


def test_what_differs_is_worked_out_anew():
    shapes, mul = KnownShapes(), torch.ops.aten.mul.Tensor
    one = torch.empty(4, 6, device="meta")
    half, turned = one.bfloat16(), torch.empty(6, 4, device="meta").t()
    for args in ((one, one), (half, half), (one, half), (turned, turned), (one, 2), (one, 2.0), (one, True)):
        for _ in range(2):
            found, expected = shapes.of(mul, args, {}), mul(*args)
            assert (found.shape, found.stride(), found.dtype) == (
                expected.shape, expected.stride(), expected.dtype,
            )  # fmt: skip
    assert shapes.asked == 7
    here = torch.ones(3)
    assert shapes.of(mul, (here, 2), {}).tolist() == shapes.of(mul, (here, 2), {}).tolist() == [2, 2, 2]
