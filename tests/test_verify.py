"""`melinoe verify` covers every byte of a store; nothing that a store says leads out of its folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import melinoe
from families import save_checkpoint
from melinoe.cli.main import app
from melinoe.conversion.in_place import index_in_place
from melinoe.conversion.verify import verify
from melinoe.store.manifest import MANIFEST, RESIDENT, RESIDENT_INDEX, Store, open_store, sealed


@pytest.fixture
def copy(olmoe_store, tmp_path):
    """A store with everything that may stand in one, to be broken."""
    folder = shutil.copytree(olmoe_store, tmp_path / "copy")
    return folder


def flip(path: Path, byte: int, bit: int) -> None:
    """Turns one bit over, as a disk would: the times of the file stay."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def found_by_verify(folder: Path, name: str) -> bool:
    """Whether `melinoe verify` ends in one line that names the file."""
    done = CliRunner().invoke(app, ["verify", str(folder)])
    return done.exit_code == 1 and name in done.output


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint with a chat template beside the usual files."""
    folder = save_checkpoint(tmp_path_factory.mktemp("source") / "model", "olmoe")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    return folder


@pytest.mark.parametrize("format", ["auto", "int4"])
def test_a_flipped_bit_anywhere_is_found(source, tmp_path, format):
    """In each file at its start, at its end and at random places: header, padding, data, spaces."""
    store = melinoe.convert(source, tmp_path / "store", format=format, progress=False)
    assert CliRunner().invoke(app, ["verify", str(store.folder)]).exit_code == 0
    names = {file.name for file in store.folder.iterdir()}
    assert {MANIFEST, RESIDENT, "config.json", "tokenizer.json", "chat_template.jinja"} < names
    places = random.Random(0)
    for file in sorted(store.folder.iterdir()):
        size = file.stat().st_size
        for byte in {0, size // 3, size - 1, *(places.randrange(size) for _ in range(3))}:
            bit = places.randrange(8)
            flip(file, byte, bit)
            assert found_by_verify(store.folder, file.name), (file.name, byte, bit)
            flip(file, byte, bit)
    assert CliRunner().invoke(app, ["verify", str(store.folder)]).exit_code == 0


def as_the_disk_would(store: Store) -> Store:
    """The store with the times of its shards as they are now: only their bytes have changed."""
    manifest = json.loads((store.folder / MANIFEST).read_text())
    for shard in manifest["shards"]:
        shard["ctime_ns"] = (store.folder / shard["file"]).stat().st_ctime_ns
    (store.folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    return open_store(store.folder)


def test_a_flipped_bit_of_a_shard_is_found(source, tmp_path):
    """Of an expert, and of what is no expert's; the header is looked at when the store is opened."""
    folder = shutil.copytree(source, tmp_path / "model")
    store = index_in_place(folder, tmp_path / "store")
    assert verify(store).compared is False
    store = open_store(store.folder)
    assert verify(store) == verify(store) and verify(store).compared and not verify(store).damaged
    file = folder / "model.safetensors"
    header = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
    places = random.Random(0)
    for byte in [
        header,
        file.stat().st_size - 1,
        *(places.randrange(header, file.stat().st_size) for _ in range(8)),
    ]:
        flip(file, byte, 3)
        assert len(verify(as_the_disk_would(store)).damaged) == 1, byte
        flip(file, byte, 3)
    assert not verify(as_the_disk_would(store)).damaged
    flip(file, 20, 0)
    with pytest.raises(melinoe.MelinoeError, match=r"has changed since it was indexed|cannot read"):
        as_the_disk_would(store)


def test_a_file_that_is_gone_or_cut_short(source, tmp_path):
    store = melinoe.convert(source, tmp_path / "store", progress=False)
    (store.folder / "tokenizer_config.json").unlink()
    assert found_by_verify(store.folder, "tokenizer_config.json is missing")
    with (store.folder / RESIDENT).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(melinoe.MelinoeError, match=rf"{RESIDENT} is truncated or damaged; got 1000 bytes"):
        melinoe.load(store.folder, slots=2)
    (store.folder / RESIDENT).unlink()
    with pytest.raises(melinoe.MelinoeError, match=rf"is missing; got .*{RESIDENT}"):
        melinoe.load(store.folder, slots=2)


def changed(folder: Path, change) -> None:
    """A manifest as somebody would write it who wants it to be believed: its checksum is right."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))


@pytest.mark.parametrize("name", ["../other/secret", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\0b"])
def test_names_that_lead_out_of_a_store_are_refused(copy, name):
    def layer(manifest):
        manifest["layers"][0]["file"] = name

    def small(manifest):
        manifest["files"][0]["name"] = name

    for change in (layer, small):
        folder = shutil.copytree(copy, copy.with_name(change.__name__))
        changed(folder, change)
        with pytest.raises(melinoe.MelinoeError, match="names a file outside of the store"):
            melinoe.load(folder, slots=2)
        with pytest.raises(melinoe.MelinoeError, match="names a file outside of the store"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_what_a_stores_config_and_index_name_is_its_own(copy, olmoe, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    for name in ("../copy/resident.safetensors", str(copy / RESIDENT), "experts-00000.safetensors"):
        config["quantization_config"]["weights"] = name
        (copy / "config.json").write_text(json.dumps(config))
        for opening in (
            lambda: melinoe.load(copy, slots=2),
            lambda: AutoModelForCausalLM.from_pretrained(copy),
        ):
            with pytest.raises(melinoe.MelinoeError, match="names other weights than its own"):
                opening()
    store = index_in_place(olmoe, tmp_path / "in-place").folder
    index = json.loads((store / RESIDENT_INDEX).read_text())
    for name in (str(olmoe / "model.safetensors"), "../in-place/model.safetensors"):
        index["weight_map"]["lm_head.weight"] = name
        (store / RESIDENT_INDEX).write_text(json.dumps(index))
        with pytest.raises(melinoe.MelinoeError, match="names weights that are not its own"):
            melinoe.load(store, slots=2)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/../../x.safetensors"])
def test_names_that_lead_out_of_a_checkpoint_are_refused(olmoe, tmp_path, name):
    folder = shutil.copytree(olmoe, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    from melinoe.runtime.load import load_resident

    for opening in (
        lambda: melinoe.load(folder, slots=2),
        lambda: melinoe.convert(folder, tmp_path / "store", progress=False),
        lambda: load_resident(folder),
    ):
        with pytest.raises(melinoe.MelinoeError, match=r"an index in .* names a file outside of the folder"):
            opening()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("layers"),
        lambda m: m.update(layers=[]),
        lambda m: m.update(layers=[1]),
        lambda m: m["layers"][0].update(num_experts=-1),
        lambda m: m["layers"][0].update(num_experts="8"),
        lambda m: m["layers"][0].update(checksums=[1]),
        lambda m: m["layers"][0].update(checksums=[]),
        lambda m: m["layers"][0].update(data_start=-4096),
        lambda m: m["layers"][0]["layout"].pop("record_bytes"),
        lambda m: m["layers"][0]["layout"].update(record_bytes=0),
        lambda m: m["layers"][0].update(sources=[[[0, 0]]] * 8),
        lambda m: m["files"].append({"name": "x"}),
        lambda m: m.update(shards=[{"file": "x"}]),
    ],
    ids=range(13),  # the same names in every process of a parallel run
)
def test_numbers_that_contradict_each_other_are_refused(copy, change):
    changed(copy, change)
    with pytest.raises(melinoe.MelinoeError, match=r"melinoe\.json is damaged"):
        melinoe.load(copy, slots=2)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer["sources"][0].__setitem__(0, [0, -64]),
        lambda layer: layer["sources"][0].__setitem__(0, [0, 2**40]),
        lambda layer: layer["sources"][0].__setitem__(0, [7, 0]),
        lambda layer: layer["sources"][0].pop(),
        lambda layer: layer["sources"].pop(),
        lambda layer: layer["pieces"].__setitem__(0, [0, 2**40]),
        lambda layer: layer["pieces"].__setitem__(0, [-64, 64]),
    ],
    ids=range(7),  # the same names in every process of a parallel run
)
def test_places_outside_of_a_shard_are_refused(olmoe, tmp_path, change):
    store = index_in_place(olmoe, tmp_path / "store").folder
    changed(store, lambda manifest: change(manifest["layers"][1]))
    with pytest.raises(melinoe.MelinoeError, match=r"melinoe\.json is damaged"):
        melinoe.load(store, slots=2)


def test_what_is_no_manifest(copy, monkeypatch):
    from melinoe.store import manifest

    for text in ("", "[]", "{", "[" * 100_000, "\udcff", '{"format": "melinoe-store", "format_version": 3}'):
        (copy / MANIFEST).write_text(text, errors="surrogateescape")
        with pytest.raises(melinoe.MelinoeError, match=r"melinoe\.json is damaged"):
            melinoe.load(copy, slots=2)
    monkeypatch.setattr(manifest, "_MAX_MANIFEST", 1000)
    (copy / MANIFEST).write_text(" " * 1001)
    with pytest.raises(melinoe.MelinoeError, match="more than 1000 bytes"):
        melinoe.load(copy, slots=2)


def test_a_header_that_says_it_is_huge_is_not_read(olmoe, copy, tmp_path):
    folder = shutil.copytree(olmoe, tmp_path / "model")
    for file, opening in (
        (folder / "model.safetensors", lambda: melinoe.convert(folder, tmp_path / "store", progress=False)),
        (copy / "experts-00001.safetensors", lambda: melinoe.load(copy, slots=2)),
        (copy / RESIDENT, lambda: melinoe.load(copy, slots=2)),
    ):
        for length in (2**63, 2**40, 10**8 + 1):
            with file.open("r+b") as handle:
                handle.write(struct.pack("<Q", length))
            with pytest.raises(melinoe.MelinoeError, match=r"cannot (read|open)"):
                opening()


def test_the_flag_finds_one_bit_where_it_is_read(copy):
    """Without it the answer may be another one, and nobody says so."""
    records = copy / "experts-00001.safetensors"
    begin = int.from_bytes(records.read_bytes()[:8], "little") + 8
    flip(records, begin + 100, 3)
    words = " ".join(f"w{number}" for number in range(50))  # they ask for every expert of a layer
    asked = ["generate", "--model", str(copy), "--slots", "4", "--raw", "-p", words, "--max-new-tokens", "2"]
    assert CliRunner().invoke(app, asked).exit_code == 0
    done = CliRunner().invoke(app, [*asked, "--verify"])
    assert done.exit_code == 1
    assert "checksum" in done.stderr


@pytest.mark.parametrize("verb", ["generate", "chat", "serve"])
def test_verbs_that_open_a_model_have_the_flag(verb):
    assert "--verify" in CliRunner().invoke(app, [verb, "--help"]).stdout
