"""An adapter and a run go with the weights they were made of, not with every model of the same routers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import melinoe
from families import save_checkpoint
from interrupting import interrupted_at
from melinoe.adapters.peft_folder import CARD, apply_adapter
from melinoe.conversion.in_place import index_in_place
from melinoe.files import partial_of
from melinoe.models.identity import ROW, differing, identity, sampled_experts
from melinoe.models.layers import fingerprint, moe_layers
from melinoe.models.pretrained import load_model
from melinoe.runtime.load import load_resident
from melinoe.store.manifest import MANIFEST, sealed
from melinoe.tuning.tune import tune
from test_streaming import quantise_fp8, save_mxfp4, save_tuning
from text_model import rows, save

REFUSED = "was tuned on another model with the same routers; got other weights in "


def further(base: Path, folder: Path, part: str, seed: int = 5) -> Path:
    """A base that was tuned further with frozen routers: a little noise on every tensor named like `part`."""
    shutil.copytree(base, folder)
    generator, changed = torch.Generator().manual_seed(seed), 0
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, value in tensors.items():
            if part in name:
                noise = torch.randn(value.shape, generator=generator) * 0.01
                tensors[name], changed = (value.float() + noise).to(value.dtype), changed + 1
        save_file(tensors, file, {"format": "pt"})
    assert changed
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(tmp_path_factory.mktemp("identity") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_tuning(base, tmp_path_factory.mktemp("identity") / "adapter")


@pytest.fixture(scope="module")
def other(base, tmp_path_factory):
    """The same routers, other experts."""
    return further(base, tmp_path_factory.mktemp("identity") / "other", ".experts.")


def load_a_checkpoint(base, adapter, folder):
    load_resident(base, adapter)


def load_in_bfloat16(base, adapter, folder):
    load_resident(base, adapter, dtype=torch.bfloat16)


def load_it_paged(base, adapter, folder):
    melinoe.load(base, adapter=adapter, slots=2)


def load_a_converted_store(base, adapter, folder):
    melinoe.convert(base, folder / "store", progress=False)
    melinoe.load(folder / "store", adapter=adapter, slots=2)


def load_a_rounded_store(base, adapter, folder):
    melinoe.convert(base, folder / "store", format="int4", progress=False)
    melinoe.load(folder / "store", adapter=adapter, slots=2)


def put_it_on_a_model(base, adapter, folder):
    apply_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)


def merge(base, adapter, folder):
    melinoe.merge(base, adapter, folder / "out")


def convert(base, adapter, folder):
    melinoe.convert(base, folder / "out", adapter=adapter, progress=False)


def convert_and_round(base, adapter, folder):
    melinoe.convert(base, folder / "out", adapter=adapter, format="int8", progress=False)


WAYS = [
    load_a_checkpoint, load_in_bfloat16, load_it_paged, load_a_converted_store, load_a_rounded_store,
    put_it_on_a_model, merge, convert, convert_and_round,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_adapter_goes_with_its_base_alone(way, base, adapter, other, tmp_path):
    assert fingerprint(load_model(base)) == fingerprint(load_model(other))
    (tmp_path / "own").mkdir()
    way(base, adapter, tmp_path / "own")
    with pytest.raises(melinoe.MelinoeError, match=REFUSED + r"model\.layers\.0\.mlp\.experts"):
        way(other, adapter, tmp_path)
    assert not (tmp_path / "out").exists() and not partial_of(tmp_path / "out").exists()


@pytest.mark.parametrize(
    "way", [load_a_checkpoint, load_a_rounded_store, convert], ids=lambda way: way.__name__
)
def test_nor_does_it_go_with_other_attention(way, base, adapter, tmp_path):
    other = further(base, tmp_path / "other", "q_proj")
    with pytest.raises(melinoe.MelinoeError, match=REFUSED + r"model\.layers\.0( and 1 more)?;"):
        way(other, adapter, tmp_path)


def test_nothing_is_left_where_a_later_layer_differs(base, adapter, tmp_path):
    other = further(base, tmp_path / "other", "layers.1.mlp.experts")
    with pytest.raises(melinoe.MelinoeError, match=REFUSED + "model.layers.1.mlp.experts"):
        convert(other, adapter, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other"]


def test_a_merged_adapter_is_not_merged_again_though_its_routers_were_frozen(base, tmp_path):
    """Where a tuning left the routers alone, the experts say that it is there already."""
    adapter = save_tuning(base, tmp_path / "adapter", routers=False)
    melinoe.merge(base, adapter, tmp_path / "merged")
    with pytest.raises(melinoe.MelinoeError, match=REFUSED):
        melinoe.merge(tmp_path / "merged", adapter, tmp_path / "twice")


@pytest.mark.parametrize("way", [load_a_checkpoint, load_it_paged, convert], ids=lambda way: way.__name__)
def test_adapters_from_before_go_on(way, adapter, other, tmp_path):
    older = shutil.copytree(adapter, tmp_path / "older")
    card = json.loads((older / CARD).read_text())
    del card["base_identity"]
    (older / CARD).write_text(json.dumps(card))
    way(other, older, tmp_path)


def test_rounded_stores_from_before_go_on(adapter, other, tmp_path):
    """Of what was rounded away nothing is known; the weights beside the experts are compared."""
    store = tmp_path / "store"
    melinoe.convert(other, store, format="int8", progress=False)
    manifest = json.loads((store / MANIFEST).read_text())
    for layer in manifest["layers"]:
        assert len(layer.pop("identity")) == 16
    (store / MANIFEST).write_text(json.dumps(sealed(manifest)))
    melinoe.load(store, adapter=adapter, slots=2)


@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        "deepseek_v3",
        "gpt_oss",
        "granitemoe",
        "nemotron_h",
        "jamba",
        "llama4_text",
        "dbrx",
        "lfm2_moe",
    ],
)
def test_all_ways_to_open_a_checkpoint_have_one_identity(family, tmp_path):
    folder = save_checkpoint(tmp_path / "base", family, torch.bfloat16)
    known = identity(load_model(folder, dtype=torch.bfloat16))
    assert {layer.experts_name for layer in moe_layers(load_model(folder))} < known.keys()
    assert identity(load_model(folder, dtype=torch.float32)) == known
    stores = {name: tmp_path / name for name in ("auto", "int8", "int4")}
    for name, store in stores.items():
        melinoe.convert(folder, store, format=name, progress=False)
    try:
        stores["in place"] = index_in_place(folder, tmp_path / "in place").folder
    except melinoe.MelinoeError:
        assert family in ("nemotron_h", "gpt_oss")
    for name, store in stores.items():
        assert identity(melinoe.load(store, slots=1)) == known, name


def test_a_store_with_a_tuning_in_it_is_the_merged_checkpoint(base, adapter, tmp_path, monkeypatch):
    """So that the next adapter, tuned on one, fits the other: rounded, and written in two goes."""
    from melinoe.conversion import convert as module

    melinoe.merge(base, adapter, tmp_path / "merged")
    write_layer = module.write_layer

    def stop_at_second(folder, index, *args):
        if index == 1:
            raise KeyboardInterrupt
        return write_layer(folder, index, *args)

    monkeypatch.setattr(module, "write_layer", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        convert_and_round(base, adapter, tmp_path)
    monkeypatch.undo()
    convert_and_round(base, adapter, tmp_path)
    known = identity(load_model(tmp_path / "merged"))
    assert identity(melinoe.load(tmp_path / "out", slots=1)) == known
    others = differing(known, identity(load_model(base)))
    assert others == [layer.experts_name for layer in moe_layers(load_model(base))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_quantised_checkpoints_have_the_identity_of_what_is_made_of_them(kind, dtype, tmp_path):
    folder = tmp_path / "base"
    if kind == "fp8":
        quantise_fp8(save_checkpoint(folder, "qwen3_moe", torch.bfloat16), 16)
    else:
        save_mxfp4(folder)
    settings = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if kind == "fp8" else {}
    known = identity(load_model(folder, dtype=dtype, **settings))
    for format in ("auto", "int8"):
        melinoe.convert(folder, tmp_path / format, format=format, progress=False)
        assert identity(melinoe.load(tmp_path / format, slots=1)) == known


def test_a_checkpoint_in_several_files_or_another_dtype_is_the_same(base, adapter, tmp_path):
    model, words = load_resident(base)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    for folder in (tmp_path / "many", tmp_path / "rounded"):
        words.save_pretrained(folder)
        load_it_paged(folder, adapter, tmp_path)
        load_a_checkpoint(folder, adapter, tmp_path)


def test_a_run_goes_on_with_its_own_base_alone(base, other, tmp_path):
    again = {"rank": 2, "max_steps": 2, "checkpoint_steps": 1, "progress": False}
    data = tmp_path / "train.jsonl"
    lines = [{"prompt": row.messages[-1]["content"], "completion": row.completion} for row in rows()]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with interrupted_at(2):
        tune(base, data, tmp_path / "out", **again)
    with pytest.raises(
        melinoe.MelinoeError, match=r"the interrupted run in .* is another one; got other base weights"
    ):
        tune(other, data, tmp_path / "out", resume=True, **again)
    run = partial_of(tmp_path / "out") / "run.json"
    known = json.loads(run.read_text())
    run.write_text(json.dumps({name: value for name, value in known.items() if name != "base_identity"}))
    assert tune(base, data, tmp_path / "out", resume=True, **again)["resumed_from"] == 1
    card = json.loads((tmp_path / "out" / CARD).read_text())
    assert not differing(card["base_identity"], identity(load_model(base))) and card["base_identity"]


def test_every_expert_is_looked_at_in_some_layer():
    for count in (1, 2, 8, 60, 128, 256):
        layers = [sampled_experts(index, count) for index in range(32)]
        assert {expert for layer in layers for expert in layer} == set(range(count))
        assert all(len(set(layer)) == min(8, count) and layer == sorted(layer) for layer in layers)
    assert ROW >= 256


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_opened_in_float16_is_not_another_one(stored, tmp_path):
    """Its numbers were rounded twice, so they say nothing against it."""
    folder = save_checkpoint(tmp_path / "base", "olmoe", stored)
    known = identity(load_model(folder, dtype=stored))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert not differing(known, identity(load_model(folder, dtype=dtype))), dtype
