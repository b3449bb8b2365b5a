"""The store on disk: ordinary safetensors, complete or absent, and every fault is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import melinoe
from families import batch, enough_for, save_checkpoint
from melinoe.config import RECORD_ALIGNMENT
from melinoe.conversion.verify import damaged_records
from melinoe.store.manifest import MANIFEST, RESIDENT, open_store


@pytest.fixture
def copy(olmoe_store, tmp_path):
    return shutil.copytree(olmoe_store, tmp_path / "copy")


def test_records_are_ordinary_safetensors(olmoe, olmoe_store):
    store = open_store(olmoe_store)
    stock = AutoModelForCausalLM.from_pretrained(olmoe)
    for index, layer in enumerate(store.layers):
        assert layer.data_start % RECORD_ALIGNMENT == 0 == layer.layout.record_bytes % RECORD_ALIGNMENT
        experts = stock.get_submodule(layer.experts_name)
        with safe_open(store.path(index), framework="pt") as file:
            assert sorted(file.keys()) == sorted(f"expert.{e}" for e in range(8))
            for expert in range(8):
                views = layer.layout.views(file.get_tensor(f"expert.{expert}").clone())
                for name, parameter in experts.named_parameters(recurse=False):
                    assert torch.equal(views[name], parameter[expert])


def test_the_resident_file_holds_no_experts(olmoe_store):
    with safe_open(olmoe_store / RESIDENT, framework="pt") as file:
        assert not [key for key in file.keys() if ".experts." in key]  # noqa: SIM118


def test_fingerprint_is_that_of_the_model(olmoe, olmoe_store):
    assert open_store(olmoe_store).fingerprint == melinoe.models.layers.fingerprint(
        AutoModelForCausalLM.from_pretrained(olmoe)
    )


def test_missing_and_truncated_record_files(copy):
    file = copy / "experts-00001.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1)
    with pytest.raises(melinoe.MelinoeError, match=r"experts-00001.*truncated"):
        melinoe.load(copy, slots=4)
    file.unlink()
    with pytest.raises(melinoe.MelinoeError, match="missing"):
        melinoe.load(copy, slots=4)


def test_flipped_bit_is_named(copy):
    store = open_store(copy)
    with store.path(1).open("r+b") as handle:
        handle.seek(store.layers[1].offset(5) + 17)
        byte = handle.read(1)[0]
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte ^ 4]))
    assert [line.split(" ")[1] for line in damaged_records(store)] == ["expert.5"]


def test_record_file_of_another_store(copy, tmp_path):
    other = save_checkpoint(tmp_path / "other", "olmoe", seed=1)
    melinoe.convert(other, tmp_path / "other-store", progress=False)
    shutil.copy(tmp_path / "other-store" / "experts-00000.safetensors", copy)
    with pytest.raises(melinoe.MelinoeError, match="belongs to another store"):
        melinoe.load(copy, slots=4)
    shutil.copy(tmp_path / "other-store" / RESIDENT, tmp_path / "other.safetensors")


def test_resident_weights_of_another_store(copy, tmp_path):
    other = save_checkpoint(tmp_path / "other", "olmoe", seed=1)
    melinoe.convert(other, tmp_path / "other-store", progress=False)
    shutil.copy(tmp_path / "other-store" / RESIDENT, copy)
    with pytest.raises(melinoe.MelinoeError, match="not those the store was made with"):
        melinoe.load(copy, slots=4)


def test_swapped_layers(copy):
    a, b = copy / "experts-00000.safetensors", copy / "experts-00001.safetensors"
    shutil.copy(a, copy / "c")
    shutil.copy(b, a)
    shutil.copy(copy / "c", b)
    with pytest.raises(melinoe.MelinoeError, match="belongs to another store"):
        melinoe.load(copy, slots=4)


def test_other_format_version(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(melinoe.MelinoeError, match="another store format"):
        melinoe.load(copy, slots=4)


def test_store_of_another_shape(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 16}))
    with pytest.raises(melinoe.MelinoeError, match="do not fit the model"):
        melinoe.load(copy, slots=4)


def test_a_dense_model_is_refused_before_anything_is_written(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path / "dense")
    with pytest.raises(melinoe.MelinoeError, match="not a mixture-of-experts"):
        melinoe.convert(tmp_path / "dense", tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_target_in_the_way(olmoe, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(melinoe.MelinoeError, match="exists"):
        melinoe.convert(olmoe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Stop(KeyboardInterrupt):
    pass


def test_an_interrupted_convert_goes_on(olmoe, olmoe_store, tmp_path, monkeypatch):
    """Stopped while the second layer is written: no store, then only the rest is read."""
    from melinoe.conversion import convert as module

    calls = []
    original = module.write_layer

    def stop_at_second(folder, layer, *args):
        calls.append(layer)
        if len(calls) == 2:
            raise Stop
        return original(folder, layer, *args)

    monkeypatch.setattr(module, "write_layer", stop_at_second)
    with pytest.raises(Stop):
        melinoe.convert(olmoe, tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()
    with pytest.raises(melinoe.MelinoeError):
        melinoe.load(tmp_path / "store.melinoe-partial", slots=4)
    melinoe.convert(olmoe, tmp_path / "store", progress=False)
    assert calls == [0, 1, 1]
    assert not (tmp_path / "store.melinoe-partial").exists()
    expected = melinoe.load(olmoe_store, slots=8)(**batch()).logits
    assert torch.equal(melinoe.load(tmp_path / "store", slots=8)(**batch()).logits, expected)


def test_leftovers_of_another_source_are_not_mixed_in(olmoe, tmp_path, monkeypatch):
    from melinoe.conversion import convert as module

    other = save_checkpoint(tmp_path / "other", "olmoe", seed=1)
    original = module.write_resident
    monkeypatch.setattr(module, "write_resident", lambda *args, **_: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        melinoe.convert(other, tmp_path / "store", progress=False)
    monkeypatch.setattr(module, "write_resident", original)
    melinoe.convert(olmoe, tmp_path / "store", progress=False)
    stock = AutoModelForCausalLM.from_pretrained(olmoe)
    model = melinoe.load(tmp_path / "store", slots=2)
    assert torch.allclose(model(**batch()).logits, stock(**batch()).logits, atol=1e-5)


def test_full_disk(olmoe, tmp_path, monkeypatch):
    from melinoe.conversion import convert as module

    full = type("usage", (), {"free": 10})()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: full)
    with pytest.raises(melinoe.MelinoeError, match="not enough disk space"):
        melinoe.convert(olmoe, tmp_path / "store", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_read_error_stops_the_generation(olmoe_store, tmp_path, monkeypatch):
    """An I/O error names file and expert, and the slots are not trusted afterwards."""
    model = melinoe.load(olmoe_store, slots=3)
    expected = model.generate(**batch(), max_new_tokens=8, do_sample=False)
    model.melinoe_paged.pager.reset()
    reads, real = [0], os.preadv

    def failing(*args):
        reads[0] += 1
        if reads[0] == 20:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(melinoe.MelinoeError, match=r"cannot read expert \d+ from .*experts-0000"):
        model.generate(**batch(), max_new_tokens=8, do_sample=False)
    monkeypatch.setattr(os, "preadv", real)
    assert torch.equal(model.generate(**batch(), max_new_tokens=8, do_sample=False), expected)


def test_settings_that_nobody_knows_are_refused(copy):
    """In a store's config.json, where a misspelt one would be ignored."""
    config = json.loads((copy / "config.json").read_text())
    mark = config["quantization_config"]
    for more in ({"slot": 3}, {"slots": 3, "polcy": "lru"}):
        config["quantization_config"] = {**mark, **more}
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            melinoe.MelinoeError, match=r"unknown settings.*got (slot|polcy);.*allowed: memory"
        ):
            AutoModelForCausalLM.from_pretrained(copy)
    config["quantization_config"] = {**mark, "slots": 3, "policy": "lru"}
    (copy / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(copy)
    assert (model.melinoe_budget.slots, model.melinoe_paged.pager.policy.name) == (3, "lru")
    assert model.config.to_dict()["quantization_config"]["slots"] == 3
    json.loads(model.config.to_json_string())


def test_save_pretrained_refuses(olmoe_store, tmp_path):
    with pytest.raises(melinoe.MelinoeError, match="would lose them"):
        melinoe.load(olmoe_store, slots=2).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_memory_budget(olmoe_store):
    with pytest.raises(melinoe.MelinoeError, match=r"too small.*allowed: \d+MiB or more") as error:
        melinoe.load(olmoe_store, memory="100KiB")
    smallest = str(error.value).split("allowed: ")[1].split(" ")[0]
    model = melinoe.load(olmoe_store, memory=smallest)
    assert 1 <= model.melinoe_budget.slots <= 8
    assert model.melinoe_budget.total_bytes <= melinoe.config.parse_bytes(smallest)
    assert model.melinoe_paged.pager.slot_bytes == (
        model.melinoe_budget.slot_bytes + model.melinoe_budget.staging_bytes
    )
    for text in ("8G", "8Gb", "lots", "-1GiB"):
        with pytest.raises(melinoe.MelinoeError, match="not a memory size"):
            melinoe.load(olmoe_store, memory=text)
    with pytest.raises(melinoe.MelinoeError, match="not both"):
        melinoe.load(olmoe_store, memory="1GiB", slots=3)
    with pytest.raises(melinoe.MelinoeError, match="unknown policy"):
        melinoe.load(olmoe_store, slots=3, policy="mru")


def test_plan_agrees_with_what_is_loaded(olmoe_store):
    memory = enough_for(olmoe_store, 5)
    planned = melinoe.plan(olmoe_store, memory=memory, measure_seconds=0.2)
    loaded = melinoe.load(olmoe_store, memory=memory).melinoe_budget
    assert planned["budget"]["slots"] == loaded.slots
    assert planned["budget"]["total_bytes"] == loaded.total_bytes
    assert planned["bandwidth"] > 0
    assert planned["ceiling_tokens_per_second"][0.5] == pytest.approx(
        2 * planned["bandwidth"] / planned["bytes_per_token"]
    )
    for share in ("0%", "101%"):
        with pytest.raises(melinoe.MelinoeError, match="share"):
            melinoe.plan(olmoe_store, memory=share)
