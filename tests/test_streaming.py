"""`convert` on its way from checkpoint to records: tunings merged in, quantised weights, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import melinoe
from families import batch, config, save_checkpoint, save_tokenizer
from melinoe.adapters.peft_folder import Base, write_adapter
from melinoe.conversion.parameter import separable
from melinoe.experts.low_rank import attach_low_rank
from melinoe.models.identity import identity
from melinoe.models.layers import fingerprint, moe_layers
from melinoe.store.manifest import Store, open_store

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def save_tuning(checkpoint: Path, folder: Path, seed: int = 7, routers: bool = True) -> Path:
    """An adapter with random factors and, where asked for, moved routers, as `melinoe tune` writes it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    base = Base(str(checkpoint), fingerprint(model), identity=identity(model))
    generator = torch.Generator().manual_seed(seed)
    for layer in moe_layers(model):
        low_rank = attach_low_rank(layer.experts, 4, 8.0, generator)
        for factor in (low_rank.up_B, low_rank.down_B):
            factor.data.normal_(std=0.1, generator=generator)
        for value in layer.router.state_dict().values():
            value += torch.randn(value.shape, generator=generator) * 0.05 * routers
    write_adapter(model, folder, base)
    return folder


def records(store: Store) -> list[torch.Tensor]:
    """Every record's bytes, padding included."""
    result = []
    for index, layer in enumerate(store.layers):
        with safe_open(store.path(index), framework="pt") as file:
            result += [file.get_tensor(f"expert.{expert}") for expert in range(layer.num_experts)]
    return result


def assert_same_model(one: Store, other: Store) -> None:
    assert one.fingerprint == other.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(records(one), records(other), strict=True))
    mine, theirs = (melinoe.load(store.folder, slots=2) for store in (one, other))
    left, right = mine.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype and torch.equal(value, right[name]), name
    assert torch.equal(mine(**batch()).logits, theirs(**batch()).logits)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "family", ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "jamba"]
)
def test_converting_with_an_adapter_is_merging_first(family, dtype, tmp_path):
    base = save_checkpoint(tmp_path / "base", family, FLOATS[dtype])
    adapter = save_tuning(base, tmp_path / "adapter")
    melinoe.merge(base, adapter, tmp_path / "merged")
    expected = melinoe.convert(tmp_path / "merged", tmp_path / "expected", progress=False)
    found = melinoe.convert(base, tmp_path / "found", adapter=adapter, progress=False)
    assert_same_model(found, expected)
    plain = melinoe.convert(base, tmp_path / "plain", progress=False)
    assert plain.fingerprint != found.fingerprint
    assert not any(torch.equal(a, b) for a, b in zip(records(plain), records(found), strict=True))


def test_an_interrupted_merge_goes_on_with_the_same_adapter_only(olmoe, tmp_path, monkeypatch):
    from melinoe.conversion import convert as module

    first, second = (save_tuning(olmoe, tmp_path / f"adapter{seed}", seed) for seed in (1, 2))
    calls, original = [], module.write_layer

    def stop_at_second(folder, layer, *args):
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(folder, layer, *args)

    monkeypatch.setattr(module, "write_layer", stop_at_second)
    for adapter, expected in ((first, [0, 1, 1]), (second, [0, 1, 0, 1]), (None, [0, 1, 0, 1])):
        calls.clear()
        target = tmp_path / f"store{len(expected)}{adapter}".replace("/", "")
        with pytest.raises(KeyboardInterrupt):
            melinoe.convert(olmoe, target, adapter=first, progress=False)
        found = melinoe.convert(olmoe, target, adapter=adapter, progress=False)
        assert calls == expected
        whole = melinoe.convert(
            olmoe, target.with_name("whole" + target.name), adapter=adapter, progress=False
        )
        assert_same_model(found, whole)


def test_an_adapter_of_another_model_is_refused_before_anything_is_written(olmoe, tmp_path):
    other = save_checkpoint(tmp_path / "other", "olmoe", seed=3)
    adapter = save_tuning(other, tmp_path / "adapter")
    with pytest.raises(melinoe.MelinoeError, match="tuned on another model"):
        melinoe.convert(olmoe, tmp_path / "store", adapter=adapter, progress=False)
    merged = tmp_path / "merged"
    melinoe.merge(other, adapter, merged)
    with pytest.raises(melinoe.MelinoeError, match="already part of this model"):
        melinoe.convert(merged, tmp_path / "store", adapter=adapter, progress=False)
    assert not list(tmp_path.glob("store*"))


# an fp8 checkpoint has blocks of 16 here, so that a tiny expert has several


def save_fp8(folder: Path, family: str, block: int = 16, seed: int = 0) -> Path:
    return quantise_fp8(save_checkpoint(folder, family, torch.bfloat16, seed), block)


def quantise_fp8(folder: Path, block: int) -> Path:
    """Every linear layer but the head in float8, a float32 scale for each block, as DeepSeek-V3 has it."""
    tensors, quantised = load_file(folder / "model.safetensors"), {}
    for name, value in tensors.items():
        linear = name.endswith("proj.weight") or (".w" in name and name.endswith(".weight"))
        if not linear or value.ndim != 2 or any(size % block for size in value.shape):
            quantised[name] = value
            continue
        rows, columns = (size // block for size in value.shape)
        blocks = value.float().view(rows, block, columns, block)
        scale = blocks.abs().amax(dim=(1, 3)) / 448 * (1 + 0.1 * torch.rand(rows, columns))
        quantised[name] = (blocks / scale[:, None, :, None]).view(value.shape).to(torch.float8_e4m3fn)
        quantised[f"{name}_scale_inv"] = scale
    assert any("experts" in name and name.endswith("scale_inv") for name in quantised)
    assert block > 16 or any("attn" in name and name.endswith("scale_inv") for name in quantised)
    save_file(quantised, folder / "model.safetensors", {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    text["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block],
        "activation_scheme": "dynamic",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def save_mxfp4(folder: Path, seed: int = 0) -> Path:
    """gpt-oss as it is published: experts in blocks of 32 four-bit numbers with one exponent each."""
    torch.manual_seed(seed)
    theirs = config("gpt_oss")
    theirs.hidden_size, theirs.intermediate_size = 64, 32
    AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    tensors, packed = load_file(folder / "model.safetensors"), {}
    for name, value in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = torch.randn_like(value) * 0.2 if "experts" in name else value
            continue
        experts, size_in, size_out = value.shape
        shape = (experts, size_out, size_in // 32)
        packed[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        packed[f"{name}_scales"] = torch.randint(120, 128, shape, dtype=torch.uint8)
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    text["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def check_dequantised(folder: Path, tmp_path: Path, settings: object) -> None:
    """Records and resident weights against stock transformers' own dequantised model, bit for bit."""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=settings)
    store = melinoe.convert(folder, tmp_path / "store", progress=False)
    for index, layer in enumerate(store.layers):
        experts = stock.get_submodule(layer.experts_name)
        with safe_open(store.path(index), framework="pt") as file:
            for expert in range(layer.num_experts):
                views = layer.layout.views(file.get_tensor(f"expert.{expert}").clone())
                for name, parameter in experts.named_parameters(recurse=False):
                    assert parameter.dtype == views[name].dtype == torch.bfloat16
                    assert torch.equal(views[name], parameter[expert]), (index, expert, name)
                    assert parameter[expert].abs().sum() > 0
    ours = melinoe.load(tmp_path / "store", slots=3)
    state = stock.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state[name]) and value.dtype == state[name].dtype, name
    stock.set_experts_implementation("grouped_mm")
    assert torch.equal(ours(**batch()).logits, stock(**batch()).logits)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "mixtral"])
def test_fp8_checkpoints_become_bfloat16_records(family, tmp_path):
    folder = save_fp8(tmp_path / "model", family, 8 if family == "mixtral" else 16)
    check_dequantised(folder, tmp_path, FineGrainedFP8Config(dequantize=True))


def test_mxfp4_checkpoints_become_bfloat16_records(tmp_path):
    check_dequantised(save_mxfp4(tmp_path / "model"), tmp_path, Mxfp4Config(dequantize=True))


def test_a_quantised_checkpoint_is_converted_on_first_use(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    folder = save_fp8(tmp_path / "model", "deepseek_v3")
    model = melinoe.load(folder, slots=2)
    assert "the checkpoint is quantised" in capfd.readouterr().err
    melinoe.convert(folder, tmp_path / "store", progress=False)
    assert torch.equal(model(**batch()).logits, melinoe.load(tmp_path / "store", slots=8)(**batch()).logits)


@pytest.mark.parametrize("lost", ["experts.3.up_proj.weight_scale_inv", "o_proj.weight_scale_inv"])
def test_a_lost_scale_is_refused(lost, tmp_path):
    """Without its scale a weight would be other numbers; an expert's later scales would all move up."""
    folder = save_fp8(tmp_path / "model", "deepseek_v3")
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith(lost))]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(melinoe.MelinoeError, match=r"every expert|no scale"):
        melinoe.convert(folder, tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()


def test_other_quantised_formats_are_named(olmoe, tmp_path):
    folder = save_checkpoint(tmp_path / "model", "olmoe")
    text = json.loads((folder / "config.json").read_text())
    text["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(text))
    with pytest.raises(melinoe.MelinoeError, match=r"cannot stream.*gptq.*fp8, mxfp4"):
        melinoe.convert(folder, tmp_path / "store", progress=False)
    assert not list(tmp_path.glob("store*"))


def test_the_conversions_that_mix_experts_are_those_that_the_docs_name():
    """Of all that transformers has; they need more memory (docs/store.md)."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightConverter

    mixing, seen = set(), set()
    for family, steps in conversion_mapping._build_checkpoint_conversion_mapping().items():
        for step in steps:
            if isinstance(step, WeightConverter) and any("experts" in name for name in step.target_patterns):
                seen.add(family)
                if not separable(step):
                    mixing.add(family)
    assert len(seen) > 50
    assert mixing == {"qwen3_vl_moe", "ernie4_5_vl_moe"}
    text = (Path(__file__).parent.parent / "docs" / "store.md").read_text()
    assert all(family in text for family in mixing)


_MEASURE = """
import sys, json
from pathlib import Path
import melinoe

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

warm, folder, target, adapter = sys.argv[1:]
melinoe.convert(warm, target + "-warm", progress=False)  # imports and pools are not what is measured
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
before = status("VmRSS")
melinoe.convert(folder, target, adapter=adapter or None, progress=False)
print(json.dumps({"above": status("VmHWM") - before}))
"""


@pytest.mark.parametrize("kind", ["olmoe", "mixtral", "gpt_oss", "fp8", "adapter"])
def test_converting_holds_fewer_than_three_records(kind, tmp_path):
    """The kernel's peak of resident memory, mapped files included, of a checkpoint of about 100 MB."""
    family = {"fp8": "deepseek_v3", "adapter": "olmoe"}.get(kind, kind)
    warm = save_checkpoint(tmp_path / "warm", family, torch.bfloat16)
    theirs = config(family)
    theirs.hidden_size, theirs.num_hidden_layers = 512, 2
    theirs.intermediate_size = theirs.moe_intermediate_size = 2048
    if family == "deepseek_v3":
        theirs.first_k_dense_replace = 0
    folder, adapter = tmp_path / "model", ""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    if kind == "fp8":
        quantise_fp8(folder, 128)
    if kind == "adapter":
        adapter = str(save_tuning(folder, tmp_path / "adapter"))
    command = [sys.executable, "-c", _MEASURE, str(warm), str(folder), str(tmp_path / "store"), adapter]
    # else the C library keeps what was freed for later, up to 32 MiB: records of this size would not go back
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    above = json.loads(done.stdout.splitlines()[-1])["above"]
    store = open_store(tmp_path / "store")
    resident = sum(file.stat().st_size for file in (tmp_path / "store").glob("resident*.safetensors"))
    held = sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors"))
    experts = sum(layer.num_experts * layer.layout.record_bytes for layer in store.layers)
    assert 90e6 < experts < 120e6
    print(
        kind, above / 1e6, "MB above,", resident / 1e6, "resident,", store.max_record_bytes / 1e6, "a record"
    )
    # the bound is three records above the resident weights; only fp8 needs that the latter are never held:
    # transformers dequantises in float32, twice the size of a record's part
    assert above < 2 * held + 3 * store.max_record_bytes + (resident if kind == "fp8" else 0)
