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
from families import batch, save_checkpoint
from melinoe.conversion.verify import damaged_records
from melinoe.experts.forward import use_melinoe_experts
from melinoe.models.layers import experts_modules
from melinoe.paging.device_reader import DeviceReader
from melinoe.paging.pager import ExpertPager
from melinoe.routing.policies import make_policy
from melinoe.runtime.load import align
from melinoe.store.layout import RecordLayout, per_expert
from melinoe.store.manifest import MANIFEST, open_store, sealed
from melinoe.store.packing import GROUP, SCALE, Packing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# gates, no gates, transposed with biases and interleaved halves, shared experts, dense layers, groups
SOME_FAMILIES = "olmoe mixtral gpt_oss qwen3_moe deepseek_v3 nemotron_h jamba llama4_text dbrx".split()


def round_trip(
    weight: torch.Tensor, name: str, transposed: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(what comes back, the views of the packed record) of one matrix and a bias beside it."""
    dtype = str(weight.dtype).removeprefix("torch.")
    layout = RecordLayout.build([("w", tuple(weight.shape), dtype), ("b", (3,), dtype)])
    packing = Packing(name, transposed, layout)
    packed_layout = packing.record_layout()
    packed = packed_layout.views(torch.zeros(packed_layout.record_bytes, dtype=torch.uint8))
    bias = torch.tensor([0.1, -7.0, 3e-3], dtype=weight.dtype)
    packing.pack({"w": weight, "b": bias}, packed)
    # nothing may be left as it was
    back = layout.views(torch.full((layout.record_bytes,), 0xFF, dtype=torch.uint8))
    packing.expand(packed, back)
    assert torch.equal(back["b"], bias)
    return back["w"], packed


def by_hand(
    packed: dict[str, torch.Tensor], shape: tuple[int, int], name: str, dtype: torch.dtype
) -> torch.Tensor:
    """The definition in docs/store.md, weight by weight, for a matrix that is not transposed."""
    out = torch.empty(shape, dtype=dtype)
    for row in range(shape[0]):
        at = 0
        for group, start in enumerate(range(0, shape[1], GROUP)):
            length = min(GROUP, shape[1] - start)
            half = -(-length // 2)
            for i in range(length):
                if name == "int8":
                    code = int(packed["w"][row, start + i])
                else:
                    byte = int(packed["w"][row, at + i % half])
                    code = (byte & 15 if i < half else byte >> 4) - 8
                product = code * float(packed["w" + SCALE][row, group])
                out[row, start + i] = torch.tensor(product, dtype=torch.float64).float().to(dtype)
            at += half
    return out


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["int8", "int4"])
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 2, 7, 63, 64, 65, 127, 128, 200]),
    scale=st.sampled_from([0.0, 1e-4, 0.02, 1.0, 100.0]),
    outliers=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_round_trip(name, dtype, rows, columns, scale, outliers, transposed, seed):
    """|w - w'| <= |scale| / 2 and rounding to the model's dtype; the bytes are the documented ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * scale
    if outliers:
        weight[0, columns // 2] *= 50
    weight = weight.to(dtype)
    back, packed = round_trip(weight.T.contiguous() if transposed else weight, name, transposed)
    if transposed:
        straight, other = round_trip(weight, name, False)
        assert torch.equal(back.T, straight)
        assert torch.equal(packed["w"].T, other["w"]) and torch.equal(
            packed["w" + SCALE].T, other["w" + SCALE]
        )
        back, packed = straight, other
    assert torch.equal(back, by_hand(packed, (rows, columns), name, dtype))
    scales = packed["w" + SCALE].double().abs().repeat_interleave(GROUP, 1)[:, :columns]
    rounding = torch.finfo(dtype).eps / 2 * weight.double().abs() + torch.finfo(dtype).smallest_normal
    rounding = rounding + scales * (2.0**-20 + torch.finfo(dtype).eps)
    assert ((weight.double() - back.double()).abs() <= scales / 2 + rounding).all()
    if name == "int8" and columns >= GROUP and scale:  # the scale is no larger than it must be
        groups = weight[:, :GROUP].double().abs().amax(1)
        assert (scales[:, 0] <= groups / 127 * 1.01 + 1e-38).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_weights_that_cannot_be_rounded(bad):
    weight = torch.randn(2, 64)
    weight[1, 3] = bad
    for name in ("int8", "int4"):
        with pytest.raises(melinoe.MelinoeError, match=r"cannot round w as int.*mend the checkpoint"):
            round_trip(weight, name, False)


def replaced(source, name):
    """The reference: all experts resident, their matrices replaced by what rounding leaves of them."""
    own = AutoModelForCausalLM.from_pretrained(source).eval()
    use_melinoe_experts(own)
    own.requires_grad_(False)
    for _, module in experts_modules(own):
        for parameter in module.parameters(recurse=False):
            weights = per_expert(parameter.data, module.num_experts)
            for expert in range(module.num_experts):
                if weights.ndim == 3:
                    weights[expert] = round_trip(weights[expert], name, module.is_transposed)[0]
    align(own)
    return own


def tokens(model, inputs):
    return model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_paged_equals_resident_rounded(family, name, dtype, tmp_path):
    source = save_checkpoint(tmp_path / "model", family, dtype)
    reference, inputs = replaced(source, name), batch()
    with torch.no_grad():
        expected = reference(**inputs).logits
    expected_tokens = tokens(reference, inputs)
    store = melinoe.convert(source, tmp_path / "store", format=name, progress=False)
    assert store.record_format == name and not list(damaged_records(store))
    for slots_format in ("packed", "expanded"):
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
            layer.layout.views(record)["down_proj" + SCALE][0, 0] *= 1.25
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
    reference = melinoe.load(int8, slots=8, device="cuda", slots_format="packed")
    model = melinoe.load(int8, slots=slots, device="cuda", slots_format=slots_format)
    for _ in range(3):
        assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    assert torch.equal(tokens(model, inputs), tokens(reference, inputs))


def test_smaller_records_give_more_slots(olmoe, olmoe_store, tmp_path):
    """Packed slots never hold fewer experts in the same memory; the budget is never more than it says."""
    wide = save_checkpoint(tmp_path / "model", "mixtral", torch.bfloat16)
    found = {}
    for name in ("auto", "int8", "int4"):
        store = melinoe.convert(wide, tmp_path / name, format=name, progress=False)
        for slots_format in ("expanded",) if name == "auto" else ("packed", "expanded"):
            planned = melinoe.plan(
                store.folder, memory="400KiB", slots_format=slots_format, measure_seconds=0
            )
            loaded = melinoe.load(store.folder, memory="400KiB", slots_format=slots_format)
            assert planned["budget"]["total_bytes"] == loaded.melinoe_budget.total_bytes <= 400 * 1024
            assert planned["budget"]["slots"] == loaded.melinoe_budget.slots
            assert planned["record_bytes"] == store.max_record_bytes
            assert loaded.melinoe_paged.pager.slot_bytes <= 400 * 1024
            found[name, slots_format] = planned["budget"]["slots"], planned["bytes_per_token"]
    assert found["int8", "packed"][0] >= found["int8", "expanded"][0]
    assert found["int4", "packed"][1] <= found["int8", "packed"][1] < found["auto", "expanded"][1]
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
        ({"format": "int4"}, "do not fit the model"),
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
    reference, inputs = replaced(source, "int8"), batch()
    inputs["input_ids"].clamp_(max=40)  # of 46 tokens
    with torch.no_grad():
        plain = reference(**inputs).logits
        apply_adapter(reference, tmp_path / "adapter")
        expected = reference(**inputs).logits
    assert not torch.equal(plain, expected)
    words = load_tokenizer(source)
    merged = melinoe.convert(  # the tuning is merged first, then the sum is rounded
        source, tmp_path / "merged", adapter=tmp_path / "adapter", format="int8", progress=False
    )
    melinoe.merge(source, tmp_path / "adapter", tmp_path / "plain")
    alike = melinoe.convert(tmp_path / "plain", tmp_path / "alike", format="int8", progress=False)
    assert [layer.checksums for layer in merged.layers] == [layer.checksums for layer in alike.layers]
    for slots_format in ("packed", "expanded"):
        model = melinoe.load(
            tmp_path / "store", adapter=tmp_path / "adapter", predictor=tmp_path / "p", slots=6,
            slots_format=slots_format,
        )  # fmt: skip
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(tokens(model, inputs), tokens(reference, inputs))
        reset_slots(model)
        answer, counted = generate(model, words, "1", max_new_tokens=8)
        assert answer == generate(reference, words, "1", max_new_tokens=8)[0]
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
