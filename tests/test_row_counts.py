"""Rows of an expert are rounded up where shapes cost something, and nothing of it is seen in a result."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import config
from melinoe.experts import compiled
from melinoe.experts import row_counts as row_counts_module
from melinoe.experts.forward import expert_output, use_melinoe_experts
from melinoe.experts.row_counts import pad, padded, row_counts


def test_rounding_up():
    assert [padded(rows) for rows in (1, 2, 3, 5, 9, 16, 17, 33, 256, 257, 512, 513, 2048)] == [
        1, 2, 4, 8, 16, 16, 32, 48, 256, 288, 512, 576, 2048,
    ]  # fmt: skip
    for rows in range(1, 5000):
        assert rows <= padded(rows) <= max(rows + 15, rows * 9 // 8)
        assert padded(padded(rows)) == padded(rows)
    for most in (1, 2, 16, 17, 300, 2048):
        assert row_counts(most) == len({padded(rows) for rows in range(1, most + 1)})


def test_float32_is_not_rounded_up():
    places = torch.arange(5)
    assert pad(places, torch.zeros(1)) is places
    assert pad(places, torch.zeros(1, dtype=torch.bfloat16)).tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4_text", "dbrx"])
def test_rows_that_are_filled_in_are_no_part_of_a_result(family, monkeypatch):
    """Bias, scaled inputs, an experts function of its own; in float32, to compare more than three digits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family)).eval().float()
    use_melinoe_experts(model)
    ids = torch.randint(3, 50, (3, 11))
    with torch.no_grad():
        plain = model(ids).logits
        monkeypatch.setattr(row_counts_module, "makes_kernels", lambda device, dtype: True)
        rounded = model(ids).logits
    assert (plain - rounded).abs().max() < 1e-5 * plain.abs().max().clamp_min(1)


def test_every_product_of_an_expert_has_a_counted_number_of_rows(monkeypatch):
    monkeypatch.setattr(compiled, "_library", None)  # what it computes needs no kernel of torch's
    monkeypatch.setattr(compiled, "_asked", True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config("olmoe"), dtype=torch.bfloat16).eval()
    use_melinoe_experts(model)
    found = set()

    def noted(module, hidden, *more):
        found.add(len(hidden))
        return expert_output(module, hidden, *more)

    monkeypatch.setattr("melinoe.experts.forward.expert_output", noted)
    with torch.no_grad():
        for length in (1, *range(2, 60, 7)):
            model(torch.randint(3, 50, (2, length)))
            model(torch.randint(3, 50, (1, length)))
    assert len(found) > 5
    assert all(padded(rows) == rows for rows in found)
