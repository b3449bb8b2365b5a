"""An offloaded model is an ordinary one where it can be, and what cannot be opened is one plain line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
import melinoe
from families import batch, save_checkpoint, save_tokenizer
from melinoe.config import parse_bytes
from melinoe.conversion.in_place import index_in_place
from melinoe.conversion.verify import verify
from melinoe.errors import MelinoeError
from melinoe.paging.slots import RecordBuffer
from melinoe.runtime.load import load_resident, load_tokenizer
from melinoe.store.manifest import MANIFEST, open_store, sealed
from melinoe.store.shards import read_header, read_stamp
from test_verify import flip

# --- arguments of from_pretrained


def test_arguments_that_say_what_is_so_anyway(olmoe_store, olmoe):
    expected = melinoe.load(olmoe_store, slots=3)(**batch()).logits
    for more in (
        {"dtype": "auto"},
        {"dtype": "float32"},
        {"dtype": torch.float32},
        {"torch_dtype": "auto"},
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": {"model": "cpu", "lm_head": torch.device("cpu")}},
        {"low_cpu_mem_usage": True, "use_safetensors": True, "trust_remote_code": False},
        {"attn_implementation": "sdpa"},
    ):
        if more.get("device_map") != "auto" or not torch.cuda.is_available():
            assert torch.equal(melinoe.load(olmoe_store, slots=3, **more)(**batch()).logits, expected), more
    eager = melinoe.load(olmoe, slots=3, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    last = eager(**batch()).logits[:, -1]  # rows of padding may be computed otherwise
    assert torch.allclose(last, expected[:, -1], atol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"dtype": "bfloat16"}, r"another dtype; got torch\.bfloat16; allowed: torch\.float32"),
        ({"dtype": "float7"}, "no such dtype; got float7; allowed: auto"),
        ({"dtype": 32}, "no such dtype; got 32"),
        ({"device_map": "balanced"}, r"on one device; got device_map='balanced'"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "on one device"),
        ({"device_map": {"": "disk"}}, "on one device"),
        ({"device": "cpu", "device_map": "cpu"}, "device or device_map, not both"),
        ({"max_memory": {"cpu": "1GiB"}}, "does not take max_memory; give memory="),
        ({"revision": "main"}, r"does not take revision; fetch .*snapshot_download"),
        ({"quantization_config": {}}, r"does not take quantization_config; convert with format='int8'"),
        ({"experts_implementation": "eager"}, "does not take experts_implementation"),
        ({"trust_remote_code": True}, "trust_remote_code=True is not possible.*not run"),
        ({"use_safetensors": False}, "use_safetensors=False is not possible.*not read"),
        ({"attn_implementation": "no_such"}, r"cannot open the model of .*no_such"),
        ({"memry": "1GiB"}, "does not know the argument memry"),
    ],
    ids=str,
)
def test_arguments_that_are_refused_by_name(olmoe_store, more, message):
    with pytest.raises(melinoe.MelinoeError, match=message):
        melinoe.load(olmoe_store, slots=3, **more)


def test_plain_from_pretrained_stays_on_one_device(olmoe_store):
    with pytest.raises(melinoe.MelinoeError, match="on one device"):
        AutoModelForCausalLM.from_pretrained(olmoe_store, device_map={"model": "cpu", "lm_head": "disk"})
    assert AutoModelForCausalLM.from_pretrained(olmoe_store, device_map="auto", dtype="auto").device.type in (
        "cpu",
        "cuda",
    )


# --- an ordinary model


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "dbrx"])
@pytest.mark.parametrize("format", ["auto", "int4"])
def test_parameters_are_counted_with_the_experts(tmp_path, family, format):
    source = save_checkpoint(tmp_path / "model", family)
    stock = AutoModelForCausalLM.from_pretrained(source)
    melinoe.convert(source, tmp_path / "store", format=format, progress=False)
    ours = melinoe.load(tmp_path / "store", slots=2)
    assert ours.num_parameters() == stock.num_parameters()
    assert ours.num_parameters(exclude_embeddings=True) == stock.num_parameters(exclude_embeddings=True)
    assert ours.num_parameters(only_trainable=True) == 0


def test_another_experts_function_is_refused(olmoe_store):
    model = melinoe.load(olmoe_store, slots=3)
    expected = model(**batch()).logits
    for name in ("eager", "grouped_mm", {"": "batched_mm"}):
        with pytest.raises(melinoe.MelinoeError, match="computes its experts with melinoe's own function"):
            model.set_experts_implementation(name)
    model.set_experts_implementation("melinoe")
    assert torch.equal(model(**batch()).logits, expected)


@pytest.mark.parametrize("in_place", [False, True], ids=["converted", "in place"])
def test_records_are_compared_when_they_are_first_read(olmoe, tmp_path, in_place):
    """Where asked for; a flipped bit stops the generation instead of changing it."""
    folder = shutil.copytree(olmoe, tmp_path / "model")
    if in_place:
        store = index_in_place(folder, tmp_path / "store")
        with pytest.raises(
            melinoe.MelinoeError, match=r"checksums .* not known yet; run once: melinoe verify"
        ):
            melinoe.load(store.folder, slots=2, verify=True)
        verify(store)
        store = open_store(store.folder)
        shard, start = store.layers[1].sources[5][0]
        file = store.folder / store.shards[shard].file
    else:
        store = melinoe.convert(folder, tmp_path / "store", progress=False)
        file, start = store.path(1), store.layers[1].offset(5)
    expected = melinoe.load(store.folder, slots=8)(**batch()).logits
    checked = melinoe.load(store.folder, slots=2, verify=True)
    assert torch.equal(checked(**batch()).logits, expected)
    flip(file.resolve(), start + 3, 6)
    if in_place:  # the time of the change alone would refuse it
        manifest = json.loads((store.folder / MANIFEST).read_text())
        manifest["shards"][shard]["ctime_ns"] = file.stat().st_ctime_ns
        (store.folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    reader = melinoe.load(store.folder, slots=2, verify=True).melinoe_paged.pager.reader
    record = RecordBuffer(1, store.max_record_bytes).tensor[0]
    reader.read(1, 4, record).result()
    with pytest.raises(melinoe.MelinoeError, match=r"cannot read expert 5 .*do not match their checksum"):
        reader.read(1, 5, record).result()
    unchecked = melinoe.load(store.folder, slots=2).melinoe_paged.pager.reader
    unchecked.read(1, 5, record).result()


# --- sizes


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("8G", "did you mean 8GB or 8GiB?"),
        ("8g", "did you mean 8GB or 8GiB?"),
        ("8Gb", "did you mean 8GB or 8GiB?"),
        (" 8 gib ", "did you mean 8GB or 8GiB?"),
        ("8", "did you mean 8GB or 8GiB?"),
        ("0.5", "did you mean 0.5GB or 0.5GiB?"),
        ("500m", "did you mean 500MB or 500MiB?"),
        ("1.5T", "did you mean 1.5TB or 1.5TiB?"),
        ("64k", "did you mean 64KB or 64KiB?"),
        ("8X", "allowed: a number with"),
        ("lots", "allowed: a number with"),
        ("-1GiB", "allowed: a number with"),
        ("", "allowed: a number with"),
        ("GiB", "allowed: a number with"),
        ("1e9", "allowed: a number with"),
    ],
)
def test_sizes_that_could_mean_something_else(text, meant):
    with pytest.raises(melinoe.MelinoeError, match="not a memory size") as error:
        parse_bytes(text)
    assert meant in str(error.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 2**33),
        ("8GB", 8 * 10**9),
        ("1.5 MiB", 3 * 2**19),
        ("4096B", 4096),
        ("1073741824", 2**30),
        (7, 7),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


# --- what cannot be opened


def config(**changes):
    def change(folder: Path) -> None:
        text = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**text, **changes}))

    return change


def text(name: str, content: str | bytes):
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


CUT = r"cannot read .*model\.safetensors"
NO_JSON = r"config\.json is not valid JSON"
MINE = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
BROKEN = {
    "config.json: no JSON": (text("config.json", '{"a": 1,'), NO_JSON + "; got .*line 1"),
    "config.json: empty": (text("config.json", ""), NO_JSON),
    "config.json: a list": (text("config.json", "[1]"), NO_JSON + "; got a list"),
    "config.json: bytes": (text("config.json", b"\xff\xfe\0"), NO_JSON + "; got .*utf-8"),
    "config.json: deep": (text("config.json", "[" * 100_000), NO_JSON),
    "unknown type": (config(model_type="frobnicate"), "does not know this type of model; got frobnicate"),
    "code of its own": (config(model_type="mine", auto_map=MINE), "comes with a checkpoint is not run"),
    "no type": (config(model_type=None), r"config\.json names no model_type"),
    "a word for a number": (config(num_experts="eight"), r"cannot open config\.json .*num_experts"),
    "an impossible number": (config(num_experts=-1), "cannot open the model of .*negative"),
    "more per token than there are": (config(num_experts_per_tok=99), "more experts per token .*99 of 8"),
    "other shapes": (config(hidden_size=48), r"other shapes? than .* config.*says; got .*allowed: \[.*48"),
    "no such dtype": (config(dtype="float7"), r"cannot open config\.json .*float7"),
    "weights: garbage": (text("model.safetensors", b"garbage" * 9), r"cannot read .*model\.safetensors"),
    "weights: cut short": (cut, CUT),
    "weights: cut short, no dtype": (lambda folder: (config(dtype=None)(folder), cut(folder)), CUT),
    "weights: empty": (text("model.safetensors", ""), r"cannot read .*model\.safetensors"),
    "generation_config.json": (text("generation_config.json", "{"), "generation_" + NO_JSON),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("verb", ["load", "resident", "convert"])
def test_a_broken_checkpoint_is_one_plain_line(olmoe, tmp_path, monkeypatch, name, verb):
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    folder = shutil.copytree(olmoe, tmp_path / "model")
    change, message = BROKEN[name]
    change(folder)
    verbs = {
        "load": lambda: melinoe.load(folder, slots=2),
        "resident": lambda: load_resident(folder),
        "convert": lambda: melinoe.load(
            melinoe.convert(folder, tmp_path / "store", progress=False).folder, slots=2
        ),
    }
    with pytest.raises(melinoe.MelinoeError, match=message) as error:
        verbs[verb]()
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "there is no tokenizer in"),
        (text("tokenizer.json", '{"a"'), r"tokenizer\.json is not valid JSON; got .*line 1"),
        (text("tokenizer.json", "{}"), "cannot open the tokenizer of"),
        (text("tokenizer_config.json", "{"), r"tokenizer_config\.json is not valid JSON"),
    ],
    ids=["none", "no JSON", "an empty object", "its config"],
)
def test_a_broken_tokenizer_is_one_plain_line(olmoe, tmp_path, change, message):
    folder = shutil.copytree(olmoe, tmp_path / "model")
    change(folder)
    with pytest.raises(melinoe.MelinoeError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_what_is_no_model_folder(olmoe, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for source, message in {
        tmp_path / "model.gguf": r"model\.gguf is a file; allowed: a model folder.*it was made from",
        olmoe / "config.json": r"config\.json is a file; allowed: a model folder",
        tmp_path: r"is not a model folder; got no config\.json in it, but GGUF",
        tmp_path / "adapter": r"is an adapter, not a model; name the model .*--adapter",
        tmp_path / "nothing": "no such model",
    }.items():
        for verb in (melinoe.load, load_resident, load_tokenizer, melinoe.plan):
            with pytest.raises(melinoe.MelinoeError, match=message):
                verb(source)


def test_a_stamp_needs_no_parsing(olmoe, tmp_path):
    """What tells a shard from another is read without the names of its tensors, and is the same."""
    [shard] = olmoe.glob("*.safetensors")
    assert read_stamp(shard) == read_header(shard).stamp
    (tmp_path / "short").write_bytes(b"1234")
    (tmp_path / "text").write_bytes(b"no header at all, only words")
    for name in ("short", "text", "missing"):
        with pytest.raises(MelinoeError, match="cannot read"):
            read_stamp(tmp_path / name)


def test_experts_whose_rows_torchs_grouped_mm_refuses(tmp_path):
    """transformers' default raises for them, so the resident model computes its experts one by one."""
    shape = families.config("olmoe")
    shape.intermediate_size = 20
    stock = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
    stock.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, "olmoe")
    with pytest.raises(RuntimeError, match="16 bytes"):
        stock(**batch())
    resident, _ = load_resident(tmp_path)
    own = melinoe.load(tmp_path, slots=2)(**batch()).logits
    assert torch.allclose(resident(**batch()).logits[:, -1], own[:, -1], atol=0.05)
    (tmp_path / "test.jsonl").write_text('{"prompt": "ab", "completion": "cd"}\n')
    found = melinoe.evaluate(tmp_path, tmp_path / "test.jsonl", metrics=("perplexity",), progress=False)
    assert found["nll"] > 0
