"""Captured decode steps. On the CPU the same code calls the step each time; Triton interprets the kernels."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import melinoe
from families import batch, save_tokenizer
from family_configs import config
from melinoe.decoding import on_device
from melinoe.decoding.captured import CapturedStep
from melinoe.experts import forward
from melinoe.native import gathered
from melinoe.paging.device_reader import DeviceReader
from melinoe.paging.paged_experts import Limits
from melinoe.paging.pager import ExpertPager
from melinoe.routing.policies import make_policy
from melinoe.sticky.settings import Stickiness
from melinoe.store import rounding

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="not interpreted there: test_gpu.py")

CPU = torch.device("cpu")
IDS = batch()["input_ids"][:1]
STICKY = Stickiness(0.3, 3, 2)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(gathered, "interpreted", True)
    # larger tiles, and prompts by torch: a program takes the interpreter a millisecond
    monkeypatch.setattr(gathered, "_ROWS", 64)
    monkeypatch.setattr(gathered, "FEW_ROWS", 1)


def in_host_memory(folder, slots, policy="decay", **settings):
    """A paged model as on a GPU: its records in host memory, its slots elsewhere."""
    model = melinoe.load(folder, slots=slots, **settings)
    paged = model.melinoe_paged
    store = paged.pager.store
    paged.pager.close()
    made = make_policy(policy, len(store.layers), 8, slots)
    reader = DeviceReader(store, CPU, pinned=True)
    paged.pager = ExpertPager(store, slots, made, reader=reader, packed=store.record_format != "auto")
    return model


def settings(new=6, **more):
    return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, **more}


def generate(model, ids=IDS, **more):
    return on_device.device_decoder_of(model).generate(model, ids, None, settings(**more))


def plainly(model, ids=IDS, **more):
    """By transformers' own loop over the same kind of cache."""
    return model.generate(ids, cache_implementation="static", **settings(**more))


@pytest.mark.parametrize("sticky", [None, STICKY], ids=["own", "sticky"])
@pytest.mark.parametrize(("slots", "policy"), [(8, "decay"), (3, "decay"), (2, "lru"), (0, "lru")])
def test_the_same_tokens(olmoe_store, slots, policy, sticky):
    model, other = (in_host_memory(olmoe_store, slots, policy, sticky=sticky) for _ in range(2))
    for ids, new in ((IDS[:, :4], 9), (IDS, 4)):
        assert torch.equal(generate(model, ids, new=new), plainly(other, ids, new=new))
    decoder = on_device.device_decoder_of(model)
    assert (decoder.captures, decoder.why_eager) == (1, "")
    found, expected = melinoe.stats(model), melinoe.stats(other)
    assert found.decode_tokens == expected.decode_tokens
    assert found.decode_requests == expected.decode_requests
    # what gets a slot crosses the bus a second time, and in the step that runs meanwhile perhaps a third
    assert expected.decode_bytes <= found.decode_bytes <= 3 * expected.decode_bytes


def test_sampling_draws_the_same(olmoe_store):
    model, other = in_host_memory(olmoe_store, 3), in_host_memory(olmoe_store, 3)
    for seed in range(2):
        torch.manual_seed(seed)
        found = generate(model, do_sample=True, temperature=1.5, top_k=0)
        torch.manual_seed(seed)
        assert torch.equal(found, plainly(other, do_sample=True, temperature=1.5, top_k=0))


def test_an_eager_pass_goes_on_where_captured_steps_have_ended(olmoe_store):
    """What sticky routers remember, and the cache, are those of the text whoever has read it."""
    model, other = (in_host_memory(olmoe_store, 3, sticky=STICKY) for _ in range(2))
    generate(model)
    text = generate(model)
    cache = on_device.device_decoder_of(model)._cache
    read = int(cache.get_seq_length())
    assert read == text.shape[1] - 1
    with torch.no_grad():
        found = model(text[:, read:], past_key_values=cache).logits
        expected = other(text[:, :read]).past_key_values
        expected = other(text[:, read:], past_key_values=expected).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_model_that_was_changed_is_captured_anew(olmoe_store):
    model, other = in_host_memory(olmoe_store, 3), in_host_memory(olmoe_store, 3)
    before = generate(model)
    for one in (model, other):
        with torch.no_grad():
            one.lm_head.weight.copy_(one.lm_head.weight.roll(1, 0))
    assert not torch.equal(generate(model), before)
    assert torch.equal(generate(model), plainly(other))
    assert on_device.device_decoder_of(model).captures == 2


def test_what_cannot_be_captured_is_generated_all_the_same(olmoe_store):
    model, other = in_host_memory(olmoe_store, 3), in_host_memory(olmoe_store, 3)
    decoder = on_device.device_decoder_of(model)
    mask = torch.ones_like(IDS)
    mask[:, :3] = 0
    assert torch.equal(generate(model, attention_mask=mask), plainly(other, attention_mask=mask))
    assert (decoder.captures, decoder.why_eager) == (0, "is given a mask")
    generate(model)
    assert (decoder.captures, decoder.why_eager) == (1, "")
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert torch.equal(generate(model), plainly(other))
    assert decoder.why_eager == "has a hook on its Linear"
    handle.remove()


def other_numbers(outputs):
    return outputs + 1


def no_numbers(_):
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("sticky", [None, STICKY], ids=["own", "sticky"])
@pytest.mark.parametrize("spoil", [other_numbers, no_numbers])
def test_a_try_to_capture_leaves_no_trace_in_the_text(olmoe_store, monkeypatch, spoil, sticky):
    """Where it breaks off in the middle, and where it has written other keys and values."""
    model, other = (in_host_memory(olmoe_store, 3, sticky=sticky) for _ in range(2))
    experts = CapturedStep._experts
    monkeypatch.setattr(CapturedStep, "_experts", lambda *given: spoil(experts(*given)))
    cache = on_device._new_cache(other, 256)
    expected = other.generate(IDS, past_key_values=cache, **settings(new=20))
    assert torch.equal(generate(model, new=20), expected)
    decoder = on_device.device_decoder_of(model)
    assert decoder.captures == 0 and "captured" in decoder.why_eager
    read = decoder._cache.get_seq_length()
    assert read == cache.get_seq_length()
    for found, layer in zip(decoder._cache.layers, cache.layers, strict=True):
        assert torch.equal(found.keys, layer.keys) and torch.equal(found.values, layer.values)
    # and the next text is read by the same attention, over a cache of the same kind
    assert torch.equal(generate(model), expected[:, : IDS.shape[1] + 6])
    assert decoder._cache.get_seq_length() == IDS.shape[1] + 5 and decoder.captures == 0


def test_a_generation_that_ends_in_an_error_leaves_the_step_to_the_next(olmoe_store):
    model, other = in_host_memory(olmoe_store, 3), in_host_memory(olmoe_store, 3)
    decoder, pager = on_device.device_decoder_of(model), model.melinoe_paged.pager

    def watch(*_):
        raise ValueError("seen enough")

    class Ending(torch.nn.Module):
        def put(self, value):
            pass

        def end(self):
            pager.watcher = watch

    with pytest.raises(ValueError, match="seen enough"):
        decoder.generate(model, IDS, Ending(), settings())
    pager.watcher = None
    assert torch.equal(generate(model), plainly(other))
    assert not decoder._busy.locked()
    assert torch.equal(generate(model, new=9), plainly(other, new=9))
    assert decoder.captures == 1 and melinoe.stats(model).decode_tokens == 5 + 5 + 8


def test_a_step_does_not_keep_its_model(olmoe_store):
    model = in_host_memory(olmoe_store, 3)
    generate(model)
    assert on_device.device_decoder_of(model).captures == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_closed_reader_is_not_read_in_place(olmoe_store):
    """Its memory is no longer the GPU's to read; copies of it can be made all the same."""
    model, other = in_host_memory(olmoe_store, 3), in_host_memory(olmoe_store, 3)
    assert torch.equal(generate(model), plainly(other))
    model.melinoe_paged.pager.close()
    assert torch.equal(generate(model), growing(other))
    decoder = on_device.device_decoder_of(model)
    assert decoder._step is None and decoder.why_eager.startswith("has records that are not held in host")


def growing(model, **more):
    """By transformers' own loop over its own kind of cache."""
    return model.generate(IDS, **settings(**more))


def test_a_cache_that_was_asked_for_is_the_one_that_is_used(olmoe_store):
    model, other = in_host_memory(olmoe_store, 3), in_host_memory(olmoe_store, 3)
    cache = DynamicCache(config=model.config)
    assert torch.equal(generate(model, past_key_values=cache), growing(other))
    assert cache.get_seq_length() == IDS.shape[1] + 5
    assert torch.equal(generate(model, cache_implementation="dynamic"), growing(other))
    assert on_device.device_decoder_of(model).captures == 0


def test_what_may_become_longer_than_the_budget_but_does_not_is_generated(olmoe_store):
    model, other = in_host_memory(olmoe_store, 3), in_host_memory(olmoe_store, 3)
    model.melinoe_paged.limits = Limits(1, IDS.shape[1] + 6, 512)
    stopping = [lambda ids, *_: torch.tensor([ids.shape[1] >= IDS.shape[1] + 6])]
    found = generate(model, max_new_tokens=90, min_new_tokens=1, stopping_criteria=stopping)
    assert torch.equal(found, growing(other))
    assert torch.equal(generate(model), plainly(other))
    assert on_device.device_decoder_of(model).captures == 1


def test_a_second_thread_while_the_first_looks_at_a_model_that_is_not_paged(olmoe):
    model = AutoModelForCausalLM.from_pretrained(olmoe).eval()
    decoder = on_device.device_decoder_of(model)
    with decoder._busy:
        assert torch.equal(generate(model), growing(model))


@pytest.mark.parametrize("setting", ["flash", "tf32", "autocast"])
def test_a_setting_of_torch_is_in_the_step(olmoe_store, setting):
    model, cuda = in_host_memory(olmoe_store, 3), torch.backends.cuda
    before = cuda.flash_sdp_enabled(), cuda.matmul.fp32_precision, torch.is_autocast_enabled("cuda")
    expected = generate(model)
    try:
        cuda.enable_flash_sdp(before[0] ^ (setting == "flash"))
        if setting == "tf32":
            cuda.matmul.fp32_precision = "tf32"
        torch.set_autocast_enabled("cuda", setting == "autocast")
        assert torch.equal(generate(model), expected)
        assert on_device.device_decoder_of(model).captures == 2
    finally:
        cuda.enable_flash_sdp(before[0])
        cuda.matmul.fp32_precision = before[1]
        torch.set_autocast_enabled("cuda", before[2])


def test_how_long_a_text_may_become_decides_on_its_cache(olmoe_store):
    model, other = in_host_memory(olmoe_store, 3), in_host_memory(olmoe_store, 3)
    decoder = on_device.device_decoder_of(model)
    for new, length in ((4, 256), (300, 512), (4, 256)):
        stopping = {"stopping_criteria": [lambda ids, *_: torch.tensor([ids.shape[1] >= IDS.shape[1] + 4])]}
        found = generate(model, max_new_tokens=new, min_new_tokens=1, **(stopping if new > 4 else {}))
        assert decoder._cache.layers[0].max_cache_len == length
        assert torch.equal(found, plainly(other, new=4))
    assert decoder.captures == 3


def test_two_threads(olmoe_store):
    """The second one has transformers' own loop, and a cache of its own."""
    model = in_host_memory(olmoe_store, 3)
    expected = {new: generate(model, new=new).tolist() for new in (8, 9)}
    found = {}
    threads = [
        threading.Thread(target=lambda new=new: found.update({new: generate(model, new=new).tolist()}))
        for new in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_prefill_between_captured_steps(olmoe_store):
    """Other passes of the model move slots; the next step looks the experts up where they are then."""
    model = in_host_memory(olmoe_store, 2, "lru")
    expected = generate(model, new=8)

    class Disturbing(torch.nn.Module):
        def put(self, value):
            if value.numel() == 1:
                with torch.no_grad():
                    model(batch(seed=int(value) + 2)["input_ids"])

        def end(self):
            pass

    decoder = on_device.device_decoder_of(model)
    assert torch.equal(decoder.generate(model, IDS, Disturbing(), settings(new=8)), expected)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_packed_records_are_computed_as_they_lie(tmp_path, name):
    """To the same tokens as passes that are not captured."""
    settings = config("olmoe")
    settings.intermediate_size = 64
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    melinoe.convert(tmp_path / "model", tmp_path / "store", format=name, progress=False)
    model, other = in_host_memory(tmp_path / "store", 3), in_host_memory(tmp_path / "store", 3)
    assert torch.equal(generate(model), plainly(other))
    assert (on_device.device_decoder_of(model).captures, model.melinoe_paged.pager.packed) == (1, True)


FORMS = [("auto", 0), ("int8", 0), ("int4", 64), ("int4", 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(("name", "tile"), FORMS)
@pytest.mark.parametrize(("hidden", "inner"), [(48, 24), (200, 128), (600, 40)])
def test_kernels(hidden, inner, name, tile, dtype, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(gathered, "interpreted", True)
    form = gathered.Form(inner, name, tile)
    assert form.computed == (name != "int4" or inner % tile == 0)
    if not form.computed:
        return
    row, stored, expanded = random_experts(hidden, inner, name, tile, dtype)
    found, expected = gathered.gated(row, stored, form), by_float64(row, expanded)
    limit = 1e-6 if dtype == torch.float32 else 2e-3
    assert (found.double() - expected).norm() < limit * expected.norm()


def test_the_kernels_are_tried_before_they_are_used(monkeypatch, capsys):
    found = gathered._found.__wrapped__
    assert found(CPU)
    other = gathered.Form
    monkeypatch.setattr(gathered, "Form", lambda inner: other(inner // 2))  # computes something else
    assert not found(CPU)
    monkeypatch.setattr(gathered, "Form", lambda inner: 1 / 0)
    assert not found(CPU)
    assert (
        "no Triton kernels on this machine, decoding is slower: division by zero" in capsys.readouterr().err
    )


def test_rows_are_computed_as_one_alone_is():
    """However many there are, and whatever experts are computed with them."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(5, 48, generator=generator)
    _, parts, _ = random_experts(48, 24, "auto", 0, torch.float32)
    form = gathered.Form(24)
    alone = torch.stack([gathered.gated(row[None], parts, form) for row in rows])  # [N, K, H]
    assert torch.equal(gathered.gated(rows, parts, form), alone.transpose(0, 1).flatten(0, 1))
    choices = [torch.tensor(each) for each in ([1, 4, 9], [0, 5], [3, 2, 8, 7])]
    found = torch.full((10, 48), 7.0)
    gathered.gated_rows(rows, choices, parts, found, form)
    for expert, places in enumerate(choices):
        assert torch.equal(found[places], alone[places // 2, expert])
    assert (found[6] == 7).all()


class Largest(TorchFunctionMode):
    """Bytes of the largest tensor that torch.empty makes."""

    found = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.found = max(self.found, made.nbytes if function is torch.empty else 0)
        return made


def test_sums_of_int4_take_as_much_memory_for_any_number_of_rows(monkeypatch):
    rows = torch.randn(9, 200, generator=torch.Generator().manual_seed(1))
    _, parts, _ = random_experts(200, 128, "int4", 64, torch.float32)
    form = gathered.Form(128, "int4", 64)
    expected = gathered.gated(rows, parts, form)
    monkeypatch.setattr(gathered, "_SUMS_BYTES", 10_000, raising=False)
    with Largest() as largest:
        assert torch.equal(gathered.gated(rows, parts, form), expected)
    assert 0 < largest.found <= 10_000


@pytest.mark.parametrize("slots", [8, 2, 0])
def test_a_prompt_takes_one_launch_for_what_is_at_hand(olmoe_store, slots, monkeypatch):
    """To the bits of one expert after the other, whatever is in slots."""
    monkeypatch.setattr(gathered, "FEW_ROWS", 16)
    calls, own = [], gathered.gated_rows
    monkeypatch.setattr(gathered, "gated_rows", lambda *given: (calls.append(len(given[1])), own(*given)))
    model = in_host_memory(olmoe_store, slots)
    with torch.no_grad():
        cold, warm = model(IDS[:, :4]).logits, model(IDS[:, :4]).logits
        assert calls and (slots != 8 or max(calls) > 1)
        monkeypatch.setattr(forward, "_several", lambda *given: None)
        assert torch.equal(cold, model(IDS[:, :4]).logits) and torch.equal(cold, warm)


def random_experts(hidden, inner, name, tile, dtype):
    """A row, the tensors of three experts, and the weights that these stand for."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, hidden, generator=generator).to(dtype)
    stored, expanded = [], []
    for _ in range(3):
        up = (torch.randn(2 * inner, hidden, generator=generator) * hidden**-0.5).to(dtype)
        down = (torch.randn(hidden, inner, generator=generator) * inner**-0.5).to(dtype)
        matrices = [(one, one) if name == "auto" else rounded(one, name, tile) for one in (up, down)]
        expanded.append([weight for *_, weight in matrices])
        stored.append([tensor for *tensors, _ in matrices for tensor in tensors])
    return row, stored, expanded


def by_float64(row, experts):
    """Their outputs, [K, H]."""
    outputs = []
    for up, down in experts:
        gate, value = (row.double() @ up.double().T).chunk(2, -1)
        outputs.append((torch.nn.functional.silu(gate) * value) @ down.double().T)
    return torch.cat(outputs)


def rounded(weight, name, tile):
    """Codes, scales and the matrix that they stand for."""
    codes_shape, scales_shape = rounding.shapes(name, *weight.shape, tile)
    codes = torch.empty(codes_shape, dtype=torch.int8 if name == "int8" else torch.uint8)
    scales, expanded = torch.empty(scales_shape, dtype=torch.bfloat16), torch.empty_like(weight)
    write, expand = rounding.of(name)
    write(weight, codes, scales)
    expand(codes, scales, expanded)
    return codes, scales, expanded
