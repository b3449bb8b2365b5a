"""Few bfloat16 rows through the compiled kernels: what they compute, and when they are used."""

from __future__ import annotations

import os
import stat

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import melinoe
from families import batch, resident, save_checkpoint
from melinoe.decoding import loop
from melinoe.decoding.decoder import decoder_of
from melinoe.experts import compiled, few_rows_linear, forward
from melinoe.models.layers import experts_modules

needs_compiler = pytest.mark.skipif(not compiled.prepare(), reason="this machine has no C compiler")
SIZES = [(1, 1), (4, 32), (5, 31), (7, 33), (64, 64), (130, 192), (256, 1000)]  # (out, in)


def matrix(size_out, size_in, seed=0):
    return torch.randn(size_out, size_in, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needs_compiler
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_product(size):
    """Rounded once from a float32 sum; the same for a row alone and in company, wherever it lies."""
    weight, rows = matrix(*size), matrix(compiled.FEW_SMALL, size[1], 1)
    found = compiled.product(rows, weight)
    exact = rows.double() @ weight.double().T
    limit = exact.abs() * 2**-8 + size[1] * 2**-20 * (rows.double().abs() @ weight.double().abs().T)
    assert ((found.double() - exact).abs() <= limit).all()
    for count in range(1, len(rows)):
        assert torch.equal(compiled.product(rows[:count], weight), found[:count])
        assert torch.equal(compiled.product(rows[count:], weight), found[count:])
    elsewhere = torch.empty(weight.numel() + 3, dtype=torch.bfloat16)[3:].view(size)  # not aligned
    assert torch.equal(compiled.product(rows, elsewhere.copy_(weight)), found)


@needs_compiler
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (32, 24), (31, 33), (192, 128), (100, 257)])
def test_a_gated_expert_is_its_steps(hidden, inner):
    """One call gives the bits of the three: silu is rounded as torch's, or within a step of it."""
    up, down, rows = matrix(2 * inner, hidden), matrix(hidden, inner, 1), matrix(7, hidden, 2)
    both = compiled.product(rows, up)
    gate, value = both.chunk(2, -1)
    act = (F.silu(gate) * value).contiguous()
    found = compiled.gated(rows, [up], [down])
    apart = (found.double() - compiled.product(act, down).double()).norm()
    assert apart <= 2**-9 * found.double().norm()
    for count in range(1, 7):
        assert torch.equal(compiled.gated(rows[:count], [up], [down]), found[:count])
    other = matrix(2 * inner, hidden, 3), matrix(hidden, inner, 4)
    both_experts = compiled.gated(rows, [up, other[0]], [down, other[1]])
    assert torch.equal(both_experts, torch.cat([found, compiled.gated(rows, [other[0]], [other[1]])]))


@needs_compiler
def test_what_is_no_number_stays_none():
    weight = torch.ones(4, 40, dtype=torch.bfloat16)
    rows = torch.zeros(3, 40, dtype=torch.bfloat16)
    rows[0, 5], rows[1, 39], rows[2, 0] = float("nan"), float("inf"), 3.3e38
    found = compiled.product(rows, weight)
    assert found[0].isnan().all() and found[1].isinf().all() and found[2].isfinite().all()
    rows[2, 1] = 3.3e38
    assert compiled.product(rows, weight)[2].isinf().all()


@needs_compiler
def test_rounds_to_even():
    """A sum between two bfloat16 numbers goes to the one whose last bit is 0, as torch's does."""
    sums = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-16, -1 - 2**-8], dtype=torch.float64)
    rows = torch.tensor([[1.0, 2**-8, 2**-16]]).bfloat16()
    weight = torch.tensor([[1, 1, 0], [1, 3, 0], [1, 1, 1], [-1, -1, 0]]).bfloat16()
    assert torch.equal(compiled.product(rows, weight)[0], sums.float().bfloat16())


@needs_compiler
@pytest.mark.parametrize("without", [False, True], ids=["compiled", "torch"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h", "phimoe", "llama4_text", "dbrx"])
def test_paged_equals_resident(family, without, tmp_path, monkeypatch):
    """With the kernels and without them, and the two are as near as roundings are."""
    source = save_checkpoint(tmp_path / "model", family, torch.bfloat16)
    melinoe.convert(source, tmp_path / "store", progress=False)
    inputs = {name: value[:1] for name, value in batch().items()}
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(source).eval()(inputs["input_ids"][:, :2]).logits
        if without:
            monkeypatch.setattr(compiled, "_library", None)
        own = resident(source)
        expected = own(inputs["input_ids"][:, :2]).logits
        text = own.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert (expected - stock).abs().max() <= 0.031 * stock.abs().max()
    for slots in (8, 2, 0):
        model = melinoe.load(tmp_path / "store", slots=slots)
        assert torch.equal(model(inputs["input_ids"][:, :2]).logits, expected)
        answer = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert torch.equal(answer, text)
        model.melinoe_paged.pager.close()


@needs_compiler
def test_decoding_goes_through_them(tmp_path, monkeypatch):
    """The negative control: with a kernel that adds one, decoding differs."""
    source = save_checkpoint(tmp_path / "model", "olmoe", torch.bfloat16)
    model = resident(source)
    assert all(compiled.is_gated_silu(module) for _, module in experts_modules(model))
    with torch.no_grad():
        right = model(batch()["input_ids"][:1, :1]).logits
        monkeypatch.setattr(
            compiled, "gated", lambda rows, ups, downs: rows.new_ones(len(ups), rows.shape[1])
        )
        assert not torch.equal(model(batch()["input_ids"][:1, :1]).logits, right)


@needs_compiler
def test_a_large_matrix_takes_fewer_rows():
    large = torch.zeros(compiled.SMALL // 32, 32, dtype=torch.bfloat16)
    rows = matrix(compiled.FEW_SMALL, 32)
    assert compiled.product(rows, large) is None and compiled.gated(rows, [large], [large.T]) is None
    assert compiled.product(rows[: compiled.FEW_ROWS], large) is not None
    assert compiled.product(rows, large[:-1]) is not None


def test_what_they_do_not_compute():
    rows = matrix(2, 32)
    gradient = rows.clone().requires_grad_()
    for other in (
        rows.float(),
        matrix(compiled.FEW_SMALL + 1, 32),
        rows[:0],
        matrix(2, 64)[:, ::2],
        gradient,
    ):
        assert not compiled.few(other)
    with torch.no_grad():
        assert compiled.few(gradient) == compiled.few(rows) == compiled.prepare()


@pytest.fixture
def threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(compiled, "LARGE", 64)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("size", [(4, 64), (7, 33), (130, 192), (1, 100)], ids=str)
def test_threads_change_no_bit(threads, size):
    weight, rows = matrix(*size), matrix(3, size[1], 1)
    threads(1)
    alone = compiled.product(rows, weight)
    for count in (2, 3, 5):
        threads(count)
        assert torch.equal(compiled.product(rows, weight), alone)


@needs_compiler
def test_threads_share_experts_without_another_bit(threads):
    """Several experts, or one whose matrices are divided; silu in between has the same roundings in both."""
    ups, downs = ([matrix(*size, seed) for seed in range(5)] for size in ((96, 70), (70, 48)))
    rows = matrix(3, 70, 9)
    threads(1)
    alone = compiled.gated(rows, ups, downs)
    for count in (2, 3, 5):
        threads(count)
        assert torch.equal(compiled.gated(rows, ups, downs), alone)
        single = [compiled.gated(rows, [up], [down]) for up, down in zip(ups, downs, strict=True)]
        assert torch.equal(torch.cat(single), alone)


@needs_compiler
@pytest.mark.parametrize("count", [1, 2], ids=["one thread", "two"])
def test_experts_on_rows_of_their_own(threads, count):
    """Their outputs at the places of their rows, with the bits of each expert alone."""
    threads(count)
    tokens, top_k, hidden, inner = 6, 3, 70, 40
    rows = matrix(tokens, hidden)
    chosen = [[0], [3, 4], [16, 17, 1, 9], [2, 7, 12]]  # places; those of token 3 and others are nobody's
    ups = [matrix(2 * inner, hidden, seed) for seed in range(4)]
    downs = [matrix(hidden, inner, seed + 9) for seed in range(4)]
    out = torch.full((tokens * top_k, hidden), 7.0, dtype=torch.bfloat16)
    compiled.gated_rows(rows, [torch.tensor(one) for one in chosen], ups, downs, out)
    expected = torch.full_like(out, 7.0)
    for places, up, down in zip(chosen, ups, downs, strict=True):
        expected[places] = compiled.gated(rows[torch.tensor(places) // top_k], [up], [down])
    assert torch.equal(out, expected)


@needs_compiler
@pytest.mark.parametrize("slots", [8, 3, 0, None], ids=["all", "some", "none", "resident"])
def test_a_batch_takes_one_call_for_what_is_at_hand(slots, tmp_path, monkeypatch):
    """A prompt and steps of several sequences: the bits of one expert after the other."""
    source = save_checkpoint(tmp_path / "model", "olmoe", torch.bfloat16)
    model = resident(source) if slots is None else melinoe.load(source, slots=slots)
    ids, calls, own = batch(6)["input_ids"], [], compiled.gated_rows
    monkeypatch.setattr(compiled, "gated_rows", lambda *given: (calls.append(len(given[1])), own(*given)))

    def logits():
        with torch.no_grad():
            first = model(input_ids=ids, use_cache=True)
            step = model(input_ids=ids[:, -1:], past_key_values=first.past_key_values)
        return torch.cat([first.logits, step.logits], 1)

    for _ in range(2):  # cold and warm
        together = logits()
        assert calls and (slots not in (8, None) or max(calls) > 1)
        with monkeypatch.context() as apart:
            apart.setattr(forward, "_several", lambda *given: None)
            assert torch.equal(logits(), together)


@pytest.fixture
def every_linear(monkeypatch):
    monkeypatch.setattr(few_rows_linear, "LARGE", 1)


@needs_compiler
def test_a_linear_layer_in_its_place(every_linear):
    layer, bias = torch.nn.Linear(40, 24, bias=False), torch.nn.Linear(40, 24)
    model = torch.nn.Sequential(layer, torch.nn.Sequential(bias)).bfloat16()
    names, weight = list(model.state_dict()), layer.weight
    few_rows_linear.use_few_rows_linears(model)
    assert few_rows_linear.few_rows_linears(model) == [layer] and isinstance(layer, torch.nn.Linear)
    assert list(model.state_dict()) == names and layer.weight is weight and type(bias) is torch.nn.Linear
    x = matrix(4, 40).view(2, 2, 40)
    with torch.no_grad():
        assert torch.equal(layer(x), compiled.product(x.view(4, 40), weight).view(2, 2, 24))
        many = matrix(compiled.FEW_SMALL + 1, 40)
        assert torch.equal(layer(many), F.linear(many, weight))
    layer(x).sum().backward()  # gradients are torch's
    assert weight.grad is not None and layer(x).grad_fn is not None


@needs_compiler
@pytest.mark.parametrize("count", [1, 2], ids=["one thread", "two"])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "jamba"])
def test_linear_layers_of_paged_and_resident(family, count, every_linear, threads, tmp_path):
    """Eagerly and by a recorded step, the same tokens and logits."""
    threads(count)
    source = save_checkpoint(tmp_path / "model", family, torch.bfloat16)
    melinoe.convert(source, tmp_path / "store", progress=False)
    own, paged = resident(source), melinoe.load(tmp_path / "store", slots=2)
    assert len(few_rows_linear.few_rows_linears(paged)) == len(few_rows_linear.few_rows_linears(own)) > 0
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    for seed in range(3):
        ids = torch.randint(3, 60, (1, 5), generator=torch.Generator().manual_seed(seed))
        expected = own.generate(ids, **settings)
        assert torch.equal(paged.generate(ids, **settings), expected)
        assert torch.equal(loop.generate(paged, ids, **settings), expected)
    if family == "olmoe":
        assert decoder_of(paged).replays == 1, decoder_of(paged).why_eager


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("paged", [True, False], ids=["paged", "resident"])
def test_the_head_of_a_batch_of_prompts_is_one_product(paged, dtype, tmp_path):
    """torch would take hundreds of times as long for rows cut out of [B, S, H] by a frozen matrix."""
    source = save_checkpoint(tmp_path / "model", "olmoe", dtype)
    model = melinoe.load(source, slots=2) if paged else resident(source)
    ids, seen = batch(6)["input_ids"], []
    assert len(ids) > 1 and not model.lm_head.weight.requires_grad
    model.lm_head.register_forward_hook(lambda _module, args, _found: seen.append(args[0].is_contiguous()))
    with torch.no_grad():
        model(input_ids=ids, logits_to_keep=1)
    assert seen == [True]


@needs_compiler
def test_peft_wraps_them_and_saves_as_before(every_linear, tmp_path):
    peft = pytest.importorskip("peft")
    source = save_checkpoint(tmp_path / "model", "olmoe", torch.bfloat16)
    model = resident(source)
    before = model.state_dict()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        changed = wrapped(ids).logits
        with wrapped.disable_adapter():
            plain = wrapped(ids).logits
    assert not torch.equal(changed, plain)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(resident(source), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, changed)
    merged = again.merge_and_unload()
    assert merged.state_dict().keys() == before.keys()
    merged.save_pretrained(tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict().keys() == before.keys()


def test_machines_that_cannot_compile(tmp_path, monkeypatch):
    """No compiler, one that fails, one that lies, no place to write, the switch: torch computes."""
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiled._found() is None
    for line in ("exit 1", "touch kernels.so; exit 0"):
        (tmp_path / "cc").write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "cc").chmod(0o755)
        assert compiled._found() is None
    assert not list((tmp_path / "home" / "kernels").glob("tmp*"))
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("MELINOE_COMPILED", "0")
    assert compiled._found() is None
    monkeypatch.delenv("MELINOE_COMPILED")
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "cc" / "no folder"))
    assert compiled._found() is None


@needs_compiler
def test_a_library_that_somebody_else_may_have_written_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path))
    assert compiled._found() is not None
    [library] = (tmp_path / "kernels").iterdir()
    assert not library.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    made = library.stat().st_mtime_ns
    assert compiled._found() is not None and library.stat().st_mtime_ns == made
    library.chmod(0o666)
    assert compiled._found() is not None and library.stat().st_mtime_ns != made
