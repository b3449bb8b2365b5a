"""Smaller experts: rounded once at convert, and from then on as exact as any other store."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import melinoe
from families import batch, enough_for, save_checkpoint
from melinoe.conversion.verify import damaged_records
from melinoe.paging.device_reader import DeviceReader
from melinoe.paging.pager import ExpertPager
from melinoe.routing.policies import make_policy
from melinoe.store.layout import RecordLayout
from melinoe.store.manifest import MANIFEST, open_store, sealed
from melinoe.store.packing import SCALE, Packing
from packed_reference import packed_resident, weight_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# gates, no gates, transposed with biases and interleaved halves, shared experts, dense layers, groups
SOME_FAMILIES = "olmoe mixtral gpt_oss qwen3_moe deepseek_v3 nemotron_h jamba llama4_text dbrx".split()


def round_trip(
    weight: torch.Tensor, name: str, transposed: bool, tile: int = 64
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(what comes back, the views of the packed record) of one matrix and a bias beside it."""
    dtype = str(weight.dtype).removeprefix("torch.")
    layout = RecordLayout.build([("w", tuple(weight.shape), dtype), ("b", (3,), dtype)])
    packing = Packing(name, transposed, layout, "kernel", tile if name == "int4" else 0)
    packed_layout = packing.record_layout()
    packed = packed_layout.views(torch.zeros(packed_layout.record_bytes, dtype=torch.uint8))
    bias = torch.tensor([0.1, -7.0, 3e-3], dtype=weight.dtype)
    packing.pack({"w": weight, "b": bias}, packed)
    # nothing may be left as it was
    back = layout.views(torch.full((layout.record_bytes,), 0xFF, dtype=torch.uint8))
    packing.expand(packed, back)
    assert torch.equal(back["b"], bias)
    return back["w"], packed


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("name", "tile"), [("int8", 0), ("int4", 64), ("int4", 32)])
@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 5, 31, 64, 70]),
    columns=st.sampled_from([1, 2, 7, 63, 64, 65, 127, 128, 200]),
    scale=st.sampled_from([0.0, 1e-4, 0.02, 1.0, 100.0]),
    outliers=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_round_trip(name, tile, dtype, rows, columns, scale, outliers, transposed, seed):
    """The bytes are the documented ones; int8 loses half a step at most, int4 no more than even steps do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * scale
    if outliers:
        weight[0, columns // 2] *= 50
    weight = weight.to(dtype)
    back, packed = round_trip(weight.T.contiguous() if transposed else weight, name, transposed, tile)
    if transposed:
        straight, other = round_trip(weight, name, False, tile)
        assert torch.equal(back.T, straight)
        assert all(torch.equal(packed[key], other[key]) for key in packed)
        back = straight
    assert torch.equal(back, weight_of(packed, "w", name, tile, rows, columns).to(dtype))
    error = (weight.double() - back.double()).abs()
    rounding = torch.finfo(dtype).eps * weight.double().abs() + torch.finfo(dtype).smallest_normal
    if name == "int8":
        scales = packed["w" + SCALE].double()[:, None]
        assert (error <= scales / 2 + rounding + scales * 2.0**-7).all()
        assert (scales[:, 0] <= weight.double().abs().amax(1) / 127 * 1.01 + 1e-38).all()
        return
    wide = torch.nn.functional.pad(weight.double(), (0, -columns % 64)).unflatten(1, (-1, 64))
    low, high = wide.amin(2, keepdim=True), wide.amax(2, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-300)
    even = (((wide - low) / step).round() * step + low - wide).square().sum(2).sqrt()
    lost = torch.nn.functional.pad(error, (0, -columns % 64)).unflatten(1, (-1, 64)).square().sum(2).sqrt()
    slack = 64**0.5 * ((high - low).squeeze(2) + wide.abs().amax(2)) * (2.0**-8 + torch.finfo(dtype).eps)
    assert (lost <= even + slack + 64 * torch.finfo(dtype).smallest_normal).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_weights_that_cannot_be_rounded(bad):
    weight = torch.randn(2, 64)
    weight[1, 3] = bad
    for name in ("int8", "int4"):
        with pytest.raises(melinoe.MelinoeError, match=r"cannot round w as int.*mend the checkpoint"):
            round_trip(weight, name, False)


def tokens(model, inputs):
    return model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_paged_equals_resident_packed(family, name, dtype, tmp_path):
    source = save_checkpoint(tmp_path / "model", family, dtype)
    inputs = batch()
    store = melinoe.convert(source, tmp_path / "store", format=name, progress=False)
    assert store.record_format == name and not list(damaged_records(store))
    for slots_format in ("packed", "expanded"):
        reference = packed_resident(source, name, as_codes=slots_format == "packed")
        with torch.no_grad():
            expected, expected_tokens = reference(**inputs).logits, tokens(reference, inputs)
        for slots, policy in ((8, "decay"), (3, "lru"), (1, "lfu"), (0, "static")):
            model = melinoe.load(tmp_path / "store", slots=slots, policy=policy, slots_format=slots_format)
            assert torch.equal(model(**inputs).logits, expected), (slots_format, slots)
            assert torch.equal(tokens(model, inputs), expected_tokens), (slots_format, slots)
            pager, budget = model.melinoe_paged.pager, model.melinoe_budget
            assert pager.slot_bytes == budget.slot_bytes + budget.staging_bytes
            pager.close()


@pytest.fixture(scope="module")
def int8(olmoe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "store"
    melinoe.convert(olmoe, folder, format="int8", progress=False)
    return folder


@pytest.fixture
def copy(int8, tmp_path):
    return shutil.copytree(int8, tmp_path / "copy")


@pytest.mark.parametrize("slots_format", ["packed", "expanded"])
def test_a_wrong_scale_is_seen(int8, copy, slots_format):
    """The negative control: one scale of each expert a quarter larger, and the logits differ."""
    right = melinoe.load(int8, slots=8, slots_format=slots_format)(**batch()).logits
    store = open_store(copy)
    for index, layer in enumerate(store.layers):
        data = bytearray(store.path(index).read_bytes())
        for expert in range(layer.num_experts):
            start = layer.offset(expert)
            record = torch.frombuffer(data, dtype=torch.uint8)[start : start + layer.layout.record_bytes]
            layer.layout.views(record)["down_proj" + SCALE][0] *= 1.25
        store.path(index).write_bytes(bytes(data))
    wrong = melinoe.load(copy, slots=8, slots_format=slots_format)(**batch()).logits
    assert (right - wrong).abs().max() > 1e-3
    assert len(list(damaged_records(store))) == 16


@pytest.mark.parametrize("pinned", [True, False], ids=["host", "disk-behind"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "expanded"])
@pytest.mark.parametrize("slots", [3, 0])
def test_through_a_device_reader(int8, slots, packed, pinned):
    expected = melinoe.load(int8, slots=8)
    model = melinoe.load(int8, slots=slots)
    paged = model.melinoe_paged
    store = paged.pager.store
    paged.pager.close()
    reader = DeviceReader(store, torch.device("cpu"), pinned)
    policy = make_policy("decay", len(store.layers), 8, slots)
    paged.pager = ExpertPager(store, slots, policy, reader=reader, packed=packed)
    assert torch.equal(tokens(model, batch()), tokens(expected, batch()))
    assert paged.pager.reader.bytes_read > 0


@pytest.mark.gpu
@pytest.mark.parametrize("slots_format", ["packed", "expanded"])
@pytest.mark.parametrize("slots", [8, 3, 0])
def test_on_a_gpu(int8, slots, slots_format):
    inputs = {name: value.cuda() for name, value in batch().items()}
    reference = melinoe.load(int8, slots=8, device="cuda", slots_format=slots_format)
    model = melinoe.load(int8, slots=slots, device="cuda", slots_format=slots_format)
    for _ in range(3):
        assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    assert torch.equal(tokens(model, inputs), tokens(reference, inputs))


def test_smaller_records_give_more_slots(tmp_path):
    """Packed slots hold more experts in the same memory; the budget is never more than it says."""
    found = {}
    memory = enough_for(melinoe.convert("tiny", tmp_path / "first", progress=False).folder, 4)
    for name in ("auto", "int8", "int4"):
        store = melinoe.convert("tiny", tmp_path / name, format=name, progress=False)
        for slots_format in ("expanded",) if name == "auto" else ("packed", "expanded"):
            planned = melinoe.plan(store.folder, memory=memory, slots_format=slots_format, measure_seconds=0)
            loaded = melinoe.load(store.folder, memory=memory, slots_format=slots_format)
            assert planned["budget"]["total_bytes"] == loaded.melinoe_budget.total_bytes <= memory
            assert planned["budget"]["slots"] == loaded.melinoe_budget.slots
            assert planned["record_bytes"] == store.max_record_bytes
            found[name, slots_format] = planned["budget"]["slots"], planned["bytes_per_token"]
    assert found["int4", "packed"][0] > found["int8", "packed"][0] > found["int8", "expanded"][0]
    assert found["int4", "packed"][1] < found["int8", "packed"][1] < found["auto", "expanded"][1]
    assert found["int8", "packed"][1] == found["int8", "expanded"][1]  # reads shrink either way


def test_a_manifest_says_how_records_are_packed(int8, olmoe_store):
    packed, plain = (json.loads((folder / MANIFEST).read_text()) for folder in (int8, olmoe_store))
    assert (plain["record_format"], packed["record_format"]) == ("auto", "int8")
    assert "packing" not in plain["layers"][0] and packed["layers"][0]["packing"]["format"] == "int8"


def change(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text())
    for layer in manifest["layers"]:
        layer["packing"].update(changes)
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "int3"}, "unknown format of records"),
        ({"group": 32}, "unknown format of records"),
        ({"format": "int4"}, "unknown format of records"),
        ({"form": "loose"}, "unknown format of records"),
        ({"tile": 48}, "unknown format of records"),
        ({"transposed": True}, "do not fit the model"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(copy, changes, message):
    change(copy, **changes)
    with pytest.raises(melinoe.MelinoeError, match=message):
        melinoe.load(copy, slots=2)


def test_a_packed_record_without_its_packing_is_refused(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    for layer in manifest["layers"]:
        del layer["packing"]
    (copy / MANIFEST).write_text(json.dumps(sealed(manifest)))
    with pytest.raises(melinoe.MelinoeError, match="do not fit the model"):
        melinoe.load(copy, slots=2)


def test_another_dtype_is_refused(copy):
    """Codes alone would fit any dtype; the manifest remembers which one they came from."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    with pytest.raises(melinoe.MelinoeError, match="do not fit the model"):
        melinoe.load(copy, slots=2)


def test_choices_are_checked(olmoe, olmoe_store, int8, tmp_path):
    with pytest.raises(
        melinoe.MelinoeError, match="unknown store format; got int3; allowed: auto, int8, int4"
    ):
        melinoe.convert(olmoe, tmp_path / "store", format="int3")
    assert not list(tmp_path.iterdir())
    with pytest.raises(melinoe.MelinoeError, match="unknown format of slots"):
        melinoe.load(int8, slots=2, slots_format="folded")
    for verb in (melinoe.load, melinoe.plan):
        with pytest.raises(melinoe.MelinoeError, match=r"not packed.*--format int8"):
            verb(olmoe_store, slots=2, slots_format="packed")
    melinoe.load(olmoe_store, slots=2, slots_format="expanded")


class Stop(KeyboardInterrupt):
    pass


def test_an_interrupted_convert_goes_on_in_its_own_format_only(olmoe, int8, tmp_path, monkeypatch):
    from melinoe.conversion import convert as module

    written, original = [], module.write_layer

    def stop_at_second(folder, layer, *args):
        written.append(layer)
        if len(written) in (2, 4):
            raise Stop
        return original(folder, layer, *args)

    monkeypatch.setattr(module, "write_layer", stop_at_second)
    for name in ("int4", "int8"):  # the first layer of int4 must not be taken for one of int8
        with pytest.raises(Stop):
            melinoe.convert(olmoe, tmp_path / "store", format=name, progress=False)
    melinoe.convert(olmoe, tmp_path / "store", format="int8", progress=False)
    assert written == [0, 1, 0, 1, 1]
    expected = open_store(int8)
    for ours, theirs in zip(open_store(tmp_path / "store").layers, expected.layers, strict=True):
        assert ours.checksums == theirs.checksums and ours.layout == theirs.layout


@pytest.mark.parametrize("slots_format", ["packed", "expanded"])
def test_a_read_error_stops_the_generation(int8, monkeypatch, slots_format):
    model = melinoe.load(int8, slots=3, slots_format=slots_format)
    expected = tokens(model, batch())
    model.melinoe_paged.pager.reset()
    reads, real = [0], os.preadv

    def failing(*args):
        reads[0] += 1
        if reads[0] == 20:
            raise OSError(5, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(melinoe.MelinoeError, match=r"cannot read expert \d+ from .*experts-0000"):
        tokens(model, batch())
    monkeypatch.setattr(os, "preadv", real)
    assert torch.equal(tokens(model, batch()), expected)


def test_plain_from_pretrained_opens_it(int8):
    model = AutoModelForCausalLM.from_pretrained(int8)
    assert torch.equal(tokens(model, batch()), tokens(melinoe.load(int8, slots=8), batch()))


def test_adapter_and_predictor_on_a_packed_store(tmp_path):
    """The whole method over int8 records: low-rank additions at use, predicted experts preloaded."""
    from melinoe.adapters.peft_folder import apply_adapter
    from melinoe.measure.trace import trace
    from melinoe.prediction.fit import fit_predictor
    from melinoe.runtime.generation import generate
    from melinoe.runtime.load import load_resident, load_tokenizer, reset_slots
    from text_model import rows, save

    source, text = save(tmp_path / "model"), rows(40)
    steps = {"max_steps": 4, "batch_tokens": 128, "max_length": 64, "rank": 4, "progress": False}
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": row.prompt, "completion": row.completion}) + "\n" for row in text)
    )
    melinoe.tune(source, tmp_path / "train.jsonl", tmp_path / "adapter", **steps)
    trace(str(source), text, tmp_path / "t", adapter=tmp_path / "adapter", progress=False)
    tuned = load_resident(source, tmp_path / "adapter")
    report = fit_predictor(tuned, tmp_path / "t", tmp_path / "p", epochs=1)
    assert report["num_sequences"] == 40
    melinoe.convert(source, tmp_path / "store", format="int8", progress=False)
    inputs = batch()
    inputs["input_ids"].clamp_(max=40)  # of 46 tokens
    words = load_tokenizer(source)
    merged = melinoe.convert(  # the tuning is merged first, then the sum is rounded
        source, tmp_path / "merged", adapter=tmp_path / "adapter", format="int8", progress=False
    )
    melinoe.merge(source, tmp_path / "adapter", tmp_path / "plain")
    alike = melinoe.convert(tmp_path / "plain", tmp_path / "alike", format="int8", progress=False)
    assert [layer.checksums for layer in merged.layers] == [layer.checksums for layer in alike.layers]
    for slots_format in ("packed", "expanded"):
        reference = packed_resident(source, "int8", as_codes=slots_format == "packed")
        with torch.no_grad():
            plain = reference(**inputs).logits
            apply_adapter(reference, tmp_path / "adapter")
            reference.set_experts_implementation("packed_reference")
            expected = reference(**inputs).logits
        assert not torch.equal(plain, expected)
        model = melinoe.load(
            tmp_path / "store", adapter=tmp_path / "adapter", predictor=tmp_path / "p", slots=6,
            slots_format=slots_format,
        )  # fmt: skip
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(tokens(model, inputs), tokens(reference, inputs))
        reset_slots(model)
        answer, counted = generate(model, words, text[0].prompt, max_new_tokens=8)
        assert answer == generate(reference, words, text[0].prompt, max_new_tokens=8)[0]
        assert counted.preload_loads


def test_the_command_line(olmoe, tmp_path):
    from typer.testing import CliRunner

    from melinoe.cli.main import app

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    store = tmp_path / "store"
    said = run("convert", olmoe, store, "--format", "int8", "--quiet")
    assert said.exit_code == 0, said.output
    opened = open_store(store)
    assert "int8" in said.stdout and "less" in said.stdout
    assert f"{opened.expert_bytes / opened.expanded_bytes:.0%}" in said.stdout
    result = json.loads(run("convert", olmoe, tmp_path / "b", "--format", "int4", "--quiet", "--json").stdout)
    assert (
        result["format"] == "int4"
        and result["saved_bytes"] == open_store(tmp_path / "b").expanded_bytes - (result["expert_bytes"])
    )
    assert run("verify", store).exit_code == 0
    answers = []
    for flag in ("--packed", "--expanded"):
        budget = json.loads(run("plan", "--model", store, "--slots", 4, flag, "--json").stdout)
        assert (budget["slot_bytes"] > budget["record_bytes"]) == (flag == "--expanded")
        prompt = ("-p", "w3 w4", "--max-new-tokens", 6, "--slots", 4, "--json")
        answers.append(
            json.loads(run("generate", "--model", store, flag, *prompt).stdout.splitlines()[-1])["text"]
        )
    assert answers[0] == answers[1]
