"""Which files hold the weights, and in which dtype: what every verb reads is what `from_pretrained` reads."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import melinoe
from families import batch, save_checkpoint
from melinoe.conversion.first_use import store_of
from melinoe.conversion.in_place import index_in_place, is_in_place
from melinoe.runtime.load import load_resident
from melinoe.store.manifest import open_store


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Checkpoints of three seeds: their config and tokenizer, and their tensors."""
    new = tmp_path_factory.mktemp
    folders = [save_checkpoint(new("seed") / "model", "olmoe", seed=seed) for seed in range(3)]
    return folders[0], [load_file(folder / "model.safetensors") for folder in folders]


def write_index(folder: Path, tensors: dict[str, torch.Tensor], name: str, places: list[str]) -> None:
    """Shards in `places`, taken in turn, and an index of them."""
    shares = [dict(itertools.islice(tensors.items(), i, None, len(places))) for i in range(len(places))]
    for place, share in zip(places, shares, strict=True):
        (folder / place).parent.mkdir(exist_ok=True)
        save_file(share, folder / place, {"format": "pt"})
    where = {tensor: place for place, share in zip(places, shares, strict=True) for tensor in share}
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))


SINGLE = ["", "model.safetensors"]
INDEX = ["", "beside it", "in a folder", "in two folders", "one is missing"]
OTHERS = ["", "model.fp16.safetensors", "variant index", "pytorch_model.bin", "consolidated.safetensors"]
NAMED = ["", "named.safetensors", "named.safetensors.index.json"]
LAYOUTS = [
    ("", "", "", ""),
    *((single, index, "", "") for single in SINGLE for index in INDEX[1:]),
    *((single, "", other, "") for single in SINGLE for other in OTHERS[1:]),
    *(("model.safetensors", "beside it", "", named) for named in NAMED[1:]),
    *random.Random(0).sample(list(itertools.product(SINGLE, INDEX, OTHERS, NAMED)), 12),
]


def build(folder: Path, sources, layout: tuple[str, str, str, str]) -> Path:
    """A folder whose single file, index and others are of different seeds."""
    origin, (one, two, three) = sources
    single, index, other, named = layout
    folder.mkdir()
    for file in origin.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder)
    if single:
        save_file(one, folder / single, {"format": "pt"})
    if index:
        places = {"in a folder": ["b/s-1.safetensors", "b/s-2.safetensors"],
                  "in two folders": ["b/s.safetensors", "a/s.safetensors"]}  # fmt: skip
        places = places.get(index, ["model-1.safetensors", "model-2.safetensors"])
        write_index(folder, two, "model.safetensors.index.json", places)
        if index == "one is missing":
            (folder / places[1]).unlink()
    if other == "pytorch_model.bin":
        torch.save(three, folder / other)
    elif other == "variant index":
        write_index(folder, three, "model.fp16.safetensors.index.json", ["v-1.safetensors"])
    elif other:
        save_file(three, folder / other, {"format": "pt"})
    if named:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
        if named.endswith(".index.json"):
            write_index(folder, three, named, ["n-1.safetensors", "n-2.safetensors"])
        else:
            save_file(three, folder / named, {"format": "pt"})
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: ", ".join(filter(None, layout)) or "nothing")
def test_every_verb_reads_what_from_pretrained_reads(sources, tmp_path, monkeypatch, layout):
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    folder = build(tmp_path / "model", sources, layout)
    try:
        expected = logits(AutoModelForCausalLM.from_pretrained(folder).eval())
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)  # pickles are not read
    except Exception:
        expected = None
    verbs = {
        "evaluate": lambda: load_resident(folder)[0],
        "generate": lambda: melinoe.load(folder, slots=3),
        "in place": lambda: melinoe.load(index_in_place(folder, tmp_path / "index").folder, slots=3),
        "convert": lambda: melinoe.load(
            melinoe.convert(folder, tmp_path / "store", progress=False).folder, slots=3
        ),
    }
    for verb, opened in verbs.items():
        if expected is None:
            with pytest.raises(melinoe.MelinoeError):
                opened()
        else:
            assert torch.allclose(logits(opened()), expected, atol=1e-5), verb
    if expected is not None:
        assert is_in_place(store_of(folder).folder)


def test_what_is_not_read_is_named(sources, tmp_path):
    named = {
        ("", "", "model.fp16.safetensors", ""): r"variant of the weights only; got model\.fp16\.safetensors",
        ("", "", "variant index", ""): r"variant of the weights only; got model\.fp16\.safetensors\.index",
        ("", "", "pytorch_model.bin", ""): r"pickled weights only.*got pytorch_model\.bin.*save_pretrained",
        ("", "", "consolidated.safetensors", ""): r"from_pretrained does not find; got consolidated\.safet",
        ("", "one is missing", "", ""): r"a file of weights is missing; got no .*model-2\.safetensors",
        ("", "", "", ""): "holds no safetensors weights",
    }
    for number, (layout, message) in enumerate(named.items()):
        folder = build(tmp_path / str(number), sources, layout)
        for verb in (load_resident, lambda folder: melinoe.load(folder, slots=2)):
            with pytest.raises(melinoe.MelinoeError, match=message):
                verb(folder)
    (folder / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(melinoe.MelinoeError, match=r"GGUF weights; got weights\.gguf"):
        melinoe.load(folder, slots=2)


def test_an_adapter_beside_the_model_is_not_passed_over(sources, tmp_path):
    """transformers applies it where peft is installed; the records would not have it."""
    folder = build(tmp_path / "model", sources, ("model.safetensors", "", "", ""))
    (folder / "adapter_config.json").write_text("{}")
    for verb in (load_resident, lambda folder: melinoe.load(folder, slots=2)):
        with pytest.raises(melinoe.MelinoeError, match="holds a PEFT adapter beside the model"):
            verb(folder)


def test_a_tensor_in_two_files_is_the_last_one(sources, tmp_path):
    """from_pretrained reads every tensor of every shard, whatever the index says of it."""
    folder = build(tmp_path / "model", sources, ("", "beside it", "", ""))
    other = sources[1][2]
    file = folder / "model-2.safetensors"
    save_file({**load_file(file), "lm_head.weight": other["lm_head.weight"]}, file, {"format": "pt"})
    expected = logits(AutoModelForCausalLM.from_pretrained(folder).eval())
    melinoe.convert(folder, tmp_path / "store", progress=False)
    for source in (folder, tmp_path / "store"):
        assert torch.allclose(logits(melinoe.load(source, slots=3)), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_config_without_dtype(tmp_path, monkeypatch, dtype, sharded):
    """As dtype="auto" finds it: by the weights. So are the records, and the store opens."""
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    folder = save_checkpoint(tmp_path / "model", "olmoe", dtype)
    if sharded:
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert stock.dtype == dtype
    store = melinoe.convert(folder, tmp_path / "store", progress=False)
    experts = stock.get_submodule(store.layers[0].experts_name)
    assert store.layers[0].layout.data_bytes == sum(p[0].nbytes for p in experts.parameters())
    for model in (
        melinoe.load(store.folder, slots=3),
        melinoe.load(folder, slots=3),
        AutoModelForCausalLM.from_pretrained(store.folder),
        load_resident(folder)[0],
    ):
        assert model.dtype == model.config.dtype == dtype
        close = 1e-5 if dtype == torch.float32 else 0.1
        assert torch.allclose(logits(model).float(), logits(stock).float(), atol=close)
    assert is_in_place(store_of(folder).folder)
    assert melinoe.plan(folder, slots=2, measure_seconds=0)["record_bytes"] == store.max_record_bytes
    assert open_store(store.folder).layers[0].layout == store.layers[0].layout
