"""On a GPU: paged equals resident to the bit, in every family and by every way to generate (make gpu)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import melinoe
from families import FAMILIES, UNDECORATED, WAYS, batch, generate, save_checkpoint, save_tokenizer
from family_configs import config
from melinoe.decoding import loop, on_device
from melinoe.experts.forward import use_melinoe_experts
from melinoe.native import gathered
from melinoe.sticky.settings import Stickiness
from test_captured import FORMS, by_float64, random_experts

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


# those whose attention and experts are such as a captured step has
CAPTURED = (
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "granitemoe", "glm4_moe",
    "ernie4_5_moe", "minimax_m2", "dots1", "hunyuan_v1_moe", "flex_olmo", "afmoe",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", CAPTURED)
def test_captured_steps_equal_resident(family, dtype, tmp_path):
    source = save_checkpoint(tmp_path / "model", family, dtype)
    ids = on_gpu(batch())["input_ids"][:1]
    length = {"max_new_tokens": 50, "min_new_tokens": 50, "do_sample": False}
    own = resident(source)
    own.generation_config.disable_compile = True
    expected = own.generate(ids, **length, cache_implementation="static")
    melinoe.convert(source, tmp_path / "store", progress=False)
    for slots, policy in [(8, "decay"), (5, "lru"), (3, "decay"), (0, "lru")]:
        model = melinoe.load(tmp_path / "store", slots=slots, policy=policy, device="cuda")
        decoder = on_device.device_decoder_of(model)
        for _ in range(2):
            assert torch.equal(loop.generate(model, ids, **length), expected), (slots, policy)
            assert (decoder.captures, decoder.why_eager) == (1, "")
        assert melinoe.stats(model).decode_tokens == 2 * 49


@pytest.mark.parametrize("sticky", [None, Stickiness(0.3, 3, 2)], ids=["own", "sticky"])
@pytest.mark.parametrize("name", ["auto", "int8", "int4"])
def test_captured_steps_equal_passes_that_are_not(tmp_path, name, sticky):
    settings = config("olmoe")
    settings.intermediate_size = 64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    melinoe.convert(tmp_path / "model", tmp_path / "store", format=name, progress=False)
    length = {"max_new_tokens": 50, "min_new_tokens": 50, "do_sample": False}
    ids = on_gpu(batch())["input_ids"][:1]
    expected = None
    for slots in (8, 3, 0):
        model = melinoe.load(tmp_path / "store", slots=slots, device="cuda", sticky=sticky)
        assert model.melinoe_paged.pager.packed == (name != "auto")
        plainly = model.generate(ids, **length, cache_implementation="static")
        decoder = on_device.device_decoder_of(model)
        for _ in range(2):
            found = loop.generate(model, ids, **length)
            assert torch.equal(found, plainly if expected is None else expected)
            assert (decoder.captures, decoder.why_eager) == (1, "")
        expected = found


@pytest.mark.parametrize("dtype", gathered.DTYPES, ids=str)
@pytest.mark.parametrize(("name", "tile"), FORMS)
@pytest.mark.parametrize(("hidden", "inner"), [(48, 24), (200, 128), (640, 520), (2048, 1024)])
def test_kernels(hidden, inner, name, tile, dtype):
    """In device memory, in the host's, and in either, to the same bits."""
    form = gathered.Form(inner, name, tile)
    if not form.computed:
        return
    row, stored, expanded = random_experts(hidden, inner, name, tile, dtype)
    there = [[one.cuda() for one in each] for each in stored]
    host = [[one.pin_memory() for one in each] for each in stored]
    found = gathered.gated(row.cuda(), there, form)
    mixed = [there[0], host[1], there[2]]
    for parts in (host, mixed):
        assert torch.equal(gathered.gated(row.cuda(), parts, form), found)
    expected = by_float64(row, expanded)
    limit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert (found.cpu().double() - expected).norm() < limit * expected.norm()
