"""A store that is opened without melinoe refuses and says what to import; with it, every way opens it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    OlmoeConfig,
    OlmoeForCausalLM,
    pipeline,
)

import melinoe
from families import batch, resident
from melinoe.conversion.in_place import index_in_place
from melinoe.store.manifest import MANIFEST, RESIDENT, open_store
from melinoe.store.marking import NOTICE

_WAYS = """
import json, sys
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, OlmoeForCausalLM, pipeline

assert "melinoe" not in sys.modules
ways = {
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "AutoConfig": AutoConfig.from_pretrained,
    "the model's own class": OlmoeForCausalLM.from_pretrained,
    "its own class, its own config": lambda folder: OlmoeForCausalLM.from_pretrained(
        folder, config=transformers.OlmoeConfig.from_pretrained(folder)
    ),
    "pipeline": lambda folder: pipeline("text-generation", folder),
}
found = {}
for folder in sys.argv[1:]:
    for name, way in ways.items():
        try:
            way(folder)
            found[f"{folder} {name}"] = "opened"
        except Exception as error:
            found[f"{folder} {name}"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def stores(olmoe, olmoe_store, tmp_path_factory):
    in_place = tmp_path_factory.mktemp("in-place") / "store"
    index_in_place(olmoe, in_place)
    return olmoe_store, in_place


def test_transformers_alone_refuses(stores):
    done = subprocess.run(
        [sys.executable, "-c", _WAYS, *map(str, stores)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 10
    for way, said in found.items():
        assert "run `import melinoe` before it is opened (pip install melinoe-moe)" in said, way


def test_with_melinoe_every_way_gives_the_model(stores, olmoe):
    expected = resident(olmoe)(**batch()).logits
    for store in stores:
        config = AutoConfig.from_pretrained(store)
        assert type(config) is OlmoeConfig and config.model_type == "olmoe"
        assert not hasattr(config, "transformers_weights")
        for model in (
            AutoModelForCausalLM.from_pretrained(store),
            AutoModelForCausalLM.from_pretrained(store, config=config),
            OlmoeForCausalLM.from_pretrained(store),
            pipeline("text-generation", str(store), tokenizer=AutoTokenizer.from_pretrained(store)).model,
        ):
            assert torch.equal(model(**batch()).logits, expected)
            assert model.config.model_type == "olmoe"
            assert not hasattr(model.config, "transformers_weights")


@pytest.mark.parametrize("first", ["transformers", "melinoe", "AutoConfig"])
def test_whichever_is_imported_first(olmoe_store, first):
    """AutoConfig alone does not import the table of quantizers, nor that the table of configs."""
    order = {
        "transformers": "import transformers; transformers.AutoModelForCausalLM; import melinoe",
        "melinoe": "import melinoe; import transformers",
        "AutoConfig": "import transformers; transformers.AutoConfig; import melinoe",
    }
    code = f"{order[first]}; print(transformers.AutoConfig.from_pretrained({str(olmoe_store)!r}).model_type)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "olmoe"


def as_format(folder: Path, version: int) -> Path:
    """Makes of a store what melinoe wrote until format 3."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in ("files", "crc"):
        del manifest[name]
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format_version": version}))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = config["quantization_config"].pop("own_model_type")
    del config["transformers_weights"], config["quantization_config"]["weights"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / RESIDENT).rename(folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("version", [1, 2])
def test_a_store_of_an_older_format_is_upgraded(olmoe_store, olmoe, tmp_path, capfd, version):
    old = as_format(shutil.copytree(olmoe_store, tmp_path / "old"), version)
    for open_it in (open_store, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(melinoe.MelinoeError, match=r"older format|another store format.*upgrade"):
            open_it(old)
    model = melinoe.load(old, slots=3)
    assert "of an older format and has been upgraded" in capfd.readouterr().err
    assert torch.equal(model(**batch()).logits, resident(olmoe)(**batch()).logits)
    melinoe.load(old, slots=3)
    assert "upgraded" not in capfd.readouterr().err
    again, new = open_store(old), open_store(olmoe_store)
    assert (again.layers, again.fingerprint, again.store_id) == (new.layers, new.fingerprint, new.store_id)
    assert json.loads((old / "config.json").read_text())["model_type"] == NOTICE


def test_an_upgrade_that_was_killed_is_gone_on_with(olmoe_store, tmp_path, monkeypatch):
    """The manifest comes last: before it, the store is still of the older format."""
    from melinoe.conversion import upgrade

    def stop(*_):
        raise KeyboardInterrupt

    for step in ("write_text", "small_files", "write_manifest"):
        old = as_format(shutil.copytree(olmoe_store, tmp_path / step), 1)
        with monkeypatch.context() as patched:
            patched.setattr(upgrade, step, stop)
            with pytest.raises(KeyboardInterrupt):
                melinoe.load(old, slots=3)
        melinoe.load(old, slots=3)
        open_store(old)


def test_an_index_in_place_of_an_older_format_is_made_anew(olmoe, tmp_path, monkeypatch):
    from melinoe.conversion.first_use import store_of

    monkeypatch.setenv("MELINOE_HOME", str(tmp_path))
    folder = store_of(olmoe).folder
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format_version": 1}))
    with pytest.raises(melinoe.MelinoeError, match=r"another store format.*index is made anew"):
        melinoe.load(folder, slots=2)
    melinoe.load(olmoe, slots=2)
    assert open_store(folder).layers
