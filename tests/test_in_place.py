"""In-place stores: the same tokens from the checkpoint's own bytes; every change of a shard is refused."""

from __future__ import annotations

import cProfile
import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Chunk, Concatenate, Interleave, Transpose, WeightConverter
from typer.testing import CliRunner

import melinoe
from families import FAMILIES, batch, config, save_checkpoint
from melinoe.cli.main import app
from melinoe.conversion.first_use import store_of
from melinoe.conversion.in_place import NotInPlaceError, _order, index_in_place, is_in_place
from melinoe.conversion.parameter import ExpertParameter
from melinoe.conversion.verify import Verification, verify
from melinoe.errors import MelinoeError
from melinoe.models.layers import per_expert
from melinoe.models.pretrained import skeleton
from melinoe.store.manifest import MANIFEST, RESIDENT, open_store, sealed
from melinoe.store.shards import Shards


def save_sharded(folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A checkpoint in many small shards, so that experts stand across files."""
    save_checkpoint(folder, family, dtype, seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB" if dtype == torch.float32 else "20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return save_sharded(tmp_path_factory.mktemp("sharded") / "model", "olmoe")


@pytest.fixture
def shards(sharded, tmp_path):
    """A copy of the checkpoint, to be broken, and its in-place store."""
    folder = shutil.copytree(sharded, tmp_path / "model")
    index_in_place(folder, tmp_path / "store")
    return folder, tmp_path / "store"


def greedy(model, tokens: int = 8) -> torch.Tensor:
    return model.generate(**batch(), max_new_tokens=tokens, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_place_equals_converted_equals_resident(family, dtype, tmp_path):
    """Bit for bit: every record, and the logits with few slots."""
    folder = save_sharded(tmp_path / "model", family, dtype)
    converted = melinoe.convert(folder, tmp_path / "converted", progress=False)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    store = index_in_place(folder, tmp_path / "store")
    assert store.fingerprint == converted.fingerprint
    assert not list((tmp_path / "store").glob("experts-*"))
    from melinoe.paging.disk_reader import DiskReader
    from melinoe.paging.slots import RecordBuffer

    reader = DiskReader(store)
    for index, layer in enumerate(store.layers):
        experts = stock.get_submodule(layer.experts_name)
        buffer = RecordBuffer(1, layer.layout.record_bytes)
        for expert in range(layer.num_experts):
            reader.read(index, expert, buffer.tensor[0]).result()
            for name, view in layer.layout.views(buffer.tensor[0]).items():
                whole = per_expert(getattr(experts, name), layer.num_experts)
                assert torch.equal(view, whole[expert]), (index, expert, name)
    assert reader.bytes_read == sum(layer.num_experts * layer.layout.data_bytes for layer in store.layers)
    reader.close()
    ours, theirs = (melinoe.load(tmp_path / name, slots=3) for name in ("store", "converted"))
    assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)
    assert torch.equal(greedy(ours), greedy(theirs))
    if dtype == torch.float32:
        assert torch.allclose(ours(**batch()).logits, stock(**batch()).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (Transpose(1, 2), (8, 6, 4)),
        (Transpose(1, 2), (8, 4, 4)),  # square: the shapes alone would not tell
        (Transpose(1, 2, check_dims=True), (8, 6, 4)),
        (Interleave(1), (8, 6, 4)),
        (Interleave(1), (8, 2, 4)),
        (Interleave(2), (8, 6, 4)),
        (Concatenate(2), (8, 6, 4)),
        (Chunk(0), (8, 6, 4)),
    ],
    ids=str,
)
def test_what_moves_elements_is_not_read_in_place(olmoe, tmp_path, step, shape):
    """As in inkling2 (interleaved), nemotron from NeMo and qwen3_vl_moe (transposed)."""
    names = ["mlp.experts.a", "mlp.experts.b"]
    save_file({name: torch.zeros(shape) for name in names}, tmp_path / "model.safetensors", {"format": "pt"})

    def order(converter, given):
        name, sources = "model.layers.0.mlp.experts.gate_up_proj", {pattern: [pattern] for pattern in given}
        return _order(
            ExpertParameter(
                skeleton(olmoe), Shards([tmp_path / "model.safetensors"]), name, 8, converter, sources
            )
        )

    given = names if isinstance(step, Concatenate) else names[:1]
    with pytest.raises(NotInPlaceError):
        order(WeightConverter(given, "mlp.experts.gate_up_proj", [step]), given)
    plain = WeightConverter(names, "mlp.experts.gate_up_proj", [Concatenate(1)])
    assert order(plain, names[::-1]) == [1, 0]  # in the converter's order, not the checkpoint's


def test_a_checkpoint_is_indexed_on_first_use(sharded, monkeypatch, tmp_path):
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path))
    expected = greedy(melinoe.load(sharded, slots=8))
    folder = store_of(sharded).folder
    assert is_in_place(folder)
    assert torch.equal(greedy(melinoe.load(sharded, slots=2)), expected)
    assert torch.equal(greedy(AutoModelForCausalLM.from_pretrained(folder)), expected)
    assert sum(f.stat().st_size for f in folder.iterdir() if not f.is_symlink()) < 50_000
    os.utime(sharded / "config.json")  # not a shard
    os.chmod(next(sharded.glob("*.safetensors")), 0o644)  # touched, not written: indexed again, no error
    assert torch.equal(greedy(melinoe.load(sharded, slots=2)), expected)


def test_a_copy_of_the_shards_says_in_what_it_differs(sharded, tmp_path):
    index_in_place(sharded, tmp_path / "store")
    shutil.copytree(tmp_path / "store", tmp_path / "copy")  # of the files behind the links, with their times
    with pytest.raises(melinoe.MelinoeError, match="has changed since it was indexed") as error:
        melinoe.load(tmp_path / "copy", slots=4)
    got, allowed = str(error.value).split("got ")[1].split("; allowed: ")
    assert got not in allowed


def test_a_store_that_is_there_is_opened_where_nothing_can_be_written(sharded, monkeypatch, tmp_path):
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    made = store_of(sharded)
    lock = made.folder.with_name(f"{made.folder.name}.lock")
    lock.unlink()
    lock.mkdir()  # root may write anywhere, but not open a folder
    assert store_of(sharded) == made
    (tmp_path / "file").touch()
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "file"))
    with pytest.raises(melinoe.MelinoeError, match=r"cannot be made; got .* MELINOE_HOME"):
        store_of(sharded)


@pytest.fixture(scope="module")
def opened():
    """(file, mode) of every call of Python's open, while `listening`."""
    found = SimpleNamespace(files=[], listening=False)

    def note(event, arguments):
        if found.listening and event == "open" and isinstance(arguments[1], str):  # os.open tells no mode
            found.files.append((Path(arguments[0]), arguments[1]))

    sys.addaudithook(note)  # for ever
    return found


@pytest.mark.parametrize("named", ["checkpoint", "store"])
def test_a_warm_store_is_read_once(shards, tmp_path, monkeypatch, opened, named):
    """Its manifest, and the header of each shard; the readers open the shards by another way."""
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    folder = store_of(shards[0]).folder
    opened.files.clear()
    opened.listening = True
    melinoe.load(shards[0] if named == "checkpoint" else folder, slots=2)
    opened.listening = False
    read = [path.name for path, mode in opened.files if path.parent == folder and mode in ("r", "rb")]
    headers = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(headers) > 2
    assert sorted(n for n in read if n == MANIFEST or n in headers) == [MANIFEST, *headers]


def test_another_dtype_is_converted(tmp_path, monkeypatch, capfd):
    """float32 files of a model that computes in bfloat16: bytes in place would be other numbers."""
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    folder = save_checkpoint(tmp_path / "model", "olmoe")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, "dtype": "bfloat16"}))
    with pytest.raises(NotInPlaceError, match=r"float32.*bfloat16"):
        index_in_place(folder, tmp_path / "store")
    model = melinoe.load(folder, slots=4)
    assert "cannot be read in place" in capfd.readouterr().err
    assert not is_in_place(store_of(folder).folder)
    melinoe.convert(folder, tmp_path / "converted", progress=False)
    assert torch.equal(
        model(**batch()).logits, melinoe.load(tmp_path / "converted", slots=8)(**batch()).logits
    )


def replace(path: Path, other: Path) -> None:
    shutil.copy2(other, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def test_a_shard_of_another_seed(shards, tmp_path):
    """Same names, same shapes, same size, even the same time of writing: other weights."""
    folder, store = shards
    other = save_sharded(tmp_path / "other", "olmoe", seed=1)
    for name in sorted(file.name for file in folder.glob("*.safetensors")):
        index_in_place(folder, store)
        before = (folder / name).stat()
        kept = shutil.copy2(folder / name, tmp_path / "kept")
        replace(folder / name, other / name)
        os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (folder / name).stat().st_size == before.st_size
        with pytest.raises(melinoe.MelinoeError, match=f"{name} has changed since it was indexed"):
            melinoe.load(store, slots=4)
        replace(folder / name, Path(kept))
        os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_damaged_index(shards):
    """One digit of one offset: the bytes there are weights too, of somebody else."""
    _, store = shards
    text = (store / MANIFEST).read_text()
    offset = json.loads(text)["layers"][1]["sources"][5][0][1]
    (store / MANIFEST).write_text(text.replace(str(offset), str(offset + 64)))
    with pytest.raises(melinoe.MelinoeError, match=r"does not match its checksum.*index is made anew"):
        melinoe.load(store, slots=4)


def test_truncated_and_missing_shards(shards):
    folder, store = shards
    file = sorted(folder.glob("*.safetensors"))[1]
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1)
    with pytest.raises(melinoe.MelinoeError, match=r"has changed since it was indexed.*index is made anew"):
        melinoe.load(store, slots=4)
    with pytest.raises(melinoe.MelinoeError, match="truncated"):
        melinoe.load(folder, slots=4)
    file.unlink()
    with pytest.raises(melinoe.MelinoeError, match="a shard of the checkpoint is missing"):
        melinoe.load(store, slots=4)


def test_a_shard_overwritten_in_the_middle_of_a_generation(shards):
    """Also where its size stays: no token is computed from bytes of two checkpoints."""
    folder, store = shards
    model = melinoe.load(store, slots=1)
    greedy(model, 2)
    victim = folder / open_store(store).shards[open_store(store).layers[0].sources[0][0][0]].file
    with victim.open("r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        handle.write(b"\0\0\0\0")
    with pytest.raises(melinoe.MelinoeError, match="has changed while it was in use"):
        greedy(model)


@pytest.mark.parametrize("length", [None, 0], ids=["overwritten", "truncated"])
def test_resident_weights_do_not_change_with_their_file(shards, length):
    """All experts in slots, so that no read would notice: the tokens stay those of the opened checkpoint."""
    folder, store = shards
    model = melinoe.load(store, slots=8)
    expected = greedy(model)
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as handle:
            handle.write(b"\0" * file.stat().st_size)
            handle.truncate(length if length is not None else file.stat().st_size)
    assert torch.equal(greedy(model), expected)
    melinoe.runtime.load.reset_slots(model)
    with pytest.raises(melinoe.MelinoeError, match=r"changed while it was in use|ended early"):
        greedy(model)


def test_an_adapter_on_an_in_place_store(sharded, tmp_path):
    from test_streaming import save_tuning

    adapter = save_tuning(sharded, tmp_path / "adapter")
    index_in_place(sharded, tmp_path / "store")
    melinoe.convert(sharded, tmp_path / "converted", progress=False)
    ours, theirs = (melinoe.load(tmp_path / name, adapter, slots=2) for name in ("store", "converted"))
    assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)
    assert torch.equal(greedy(ours), greedy(theirs))


def test_deleted_shards_stay_readable_while_open(shards):
    folder, store = shards
    model = melinoe.load(store, slots=1)
    expected = greedy(model)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    melinoe.runtime.load.reset_slots(model)
    assert torch.equal(greedy(model), expected)


def test_a_hub_cache_of_links(sharded, tmp_path):
    """Snapshots are links to blobs; the index follows them to the end and survives the snapshot."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy2(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"{number:064x}")
    index_in_place(snapshot, tmp_path / "store")
    expected = greedy(melinoe.load(tmp_path / "store", slots=8))
    shutil.rmtree(snapshot)
    assert torch.equal(greedy(melinoe.load(tmp_path / "store", slots=2)), expected)
    assert all(link.resolve().parent == blobs for link in (tmp_path / "store").glob("*.safetensors"))


@pytest.mark.parametrize("pinned", [True, False])
def test_through_the_device_reader(sharded, tmp_path, pinned):
    """The tier for accelerators reads in place as well: here with the CPU as its device."""
    from test_device import through_device

    index_in_place(sharded, tmp_path / "store")
    expected = greedy(melinoe.load(tmp_path / "store", slots=8))
    assert torch.equal(greedy(through_device(tmp_path / "store", 2, pinned)), expected)


def test_a_file_system_without_direct_reads(sharded, tmp_path, monkeypatch):
    index_in_place(sharded, tmp_path / "store")
    expected = greedy(melinoe.load(tmp_path / "store", slots=8))
    real = os.open

    def refusing(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError("no such thing here")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    assert torch.equal(greedy(melinoe.load(tmp_path / "store", slots=1)), expected)


def test_short_reads_and_small_buffers(sharded, tmp_path, monkeypatch):
    """The kernel may return less than was asked for; the buffer may be smaller than a piece."""
    from melinoe.paging import gather

    index_in_place(sharded, tmp_path / "store")
    expected = greedy(melinoe.load(tmp_path / "store", slots=8))
    monkeypatch.setattr(gather, "BUFFER_BYTES", 4096)
    assert torch.equal(greedy(melinoe.load(tmp_path / "store", slots=1)), expected)
    monkeypatch.setattr(gather, "BUFFER_BYTES", 16384)
    real = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, start: real(fd, [memoryview(buffers[0])[:4096]], start)
    )
    assert torch.equal(greedy(melinoe.load(tmp_path / "store", slots=1)), expected)


def test_a_read_error_names_expert_and_shard(shards, monkeypatch):
    _, store = shards
    model = melinoe.load(store, slots=3)
    expected = greedy(model)
    melinoe.runtime.load.reset_slots(model)
    real, reads = os.preadv, [0]

    def failing(*args):
        reads[0] += 1
        if reads[0] == 20:
            raise OSError(5, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(melinoe.MelinoeError, match=r"cannot read expert \d+ from .*model-0000"):
        greedy(model)
    monkeypatch.setattr(os, "preadv", real)
    assert torch.equal(greedy(model), expected)


def test_layers_that_the_model_does_not_have(sharded, tmp_path, capfd):
    """Layers that predict several tokens stand in published checkpoints: neither loaded nor mentioned."""
    folder = shutil.copytree(sharded, tmp_path / "model")
    more = {f"model.layers.2.mlp.experts.{e}.up_proj.weight": torch.zeros(24, 32) for e in range(8)}
    save_file(more, folder / "model-extra.safetensors", {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(more, "model-extra.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    store = index_in_place(folder, tmp_path / "store")
    converted = melinoe.convert(folder, tmp_path / "converted", progress=False)
    with safe_open(tmp_path / "converted" / RESIDENT, framework="pt") as file:
        assert not [name for name in file.keys() if ".experts." in name]  # noqa: SIM118
    one, other = (melinoe.load(path.folder, slots=3) for path in (store, converted))
    assert torch.equal(greedy(one), greedy(other))


def test_the_experts_are_no_unexpected_keys(sharded, tmp_path, capfd):
    """from_pretrained sees them in the files; it must not read them, and need not speak of them."""
    index_in_place(sharded, tmp_path / "store")
    capfd.readouterr()
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "store", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert "UNEXPECTED" not in capfd.readouterr().err


def test_two_processes_index_the_same_checkpoint(sharded, tmp_path):
    one = index_in_place(sharded, tmp_path / "store")
    assert index_in_place(sharded, tmp_path / "store").store_id == one.store_id  # nothing was replaced
    assert not (tmp_path / "store.melinoe-partial").exists()


def test_killed_while_the_index_is_written(sharded, tmp_path, monkeypatch):
    """What stands half written is no store, and the next call makes a whole one."""
    from melinoe.conversion import in_place as module

    class Stop(KeyboardInterrupt):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(module, "copy_small_files", stop)
    with pytest.raises(Stop):
        index_in_place(sharded, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    with pytest.raises(melinoe.MelinoeError):
        melinoe.load(tmp_path / "store.melinoe-partial", slots=4)
    monkeypatch.undo()
    index_in_place(sharded, tmp_path / "store")
    assert not (tmp_path / "store.melinoe-partial").exists()
    greedy(melinoe.load(tmp_path / "store", slots=4), 2)


@pytest.mark.parametrize("point", ["copy_small_files", "finish"])
@pytest.mark.parametrize("stale", [False, True])
def test_a_real_kill(shards, tmp_path, monkeypatch, point, stale):
    """SIGKILL, so that nothing is tidied up; also where an older index is being replaced."""
    from melinoe.conversion import in_place as module

    folder, target = shards[0], shards[1] if stale else tmp_path / "fresh"
    for file in folder.glob("*.safetensors"):
        file.chmod(0o600)  # the index is out of date
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(module, point, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        index_in_place(folder, target)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with pytest.raises(melinoe.MelinoeError):
        melinoe.load(target, slots=4)
    index_in_place(folder, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"model", "store", target.name})
    greedy(melinoe.load(target, slots=4), 2)


def test_convert_does_not_mix_with_a_half_written_index(sharded, tmp_path, monkeypatch):
    from melinoe.conversion import in_place as module

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        index_in_place(sharded, tmp_path / "store")
    sizes = {file: file.stat().st_size for file in sharded.iterdir()}
    melinoe.convert(sharded, tmp_path / "store", progress=False)
    assert sizes == {
        file: file.stat().st_size for file in sharded.iterdir()
    }  # links went, not what they point at
    assert not [file for file in (tmp_path / "store").iterdir() if file.is_symlink()]
    assert not is_in_place(tmp_path / "store")


def test_an_index_never_replaces_a_converted_store(sharded, olmoe_store):
    with pytest.raises(melinoe.MelinoeError, match="exists"):
        index_in_place(sharded, olmoe_store)
    assert not is_in_place(olmoe_store)


def test_a_missing_expert_is_not_another_one(sharded, tmp_path):
    """Positions are experts' numbers: with one tensor gone all behind it would move up."""
    folder = shutil.copytree(sharded, tmp_path / "model")
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for make in (index_in_place, lambda a, b: melinoe.convert(a, b, progress=False)):
        with pytest.raises(melinoe.MelinoeError, match=r"does not hold every expert.*got 7"):
            make(folder, tmp_path / "store")


def test_damaged_manifest_and_wrong_bytes(shards):
    """`melinoe verify`: the first call remembers checksums, the second finds a flipped bit."""
    _, store = shards
    first = CliRunner().invoke(app, ["verify", str(store)])
    assert first.exit_code == 0 and "no checksums were known" in first.output
    second = CliRunner().invoke(app, ["verify", str(store)])
    assert second.exit_code == 0 and "every record and every other file matches" in second.output
    opened = open_store(store)
    shard, start = opened.layers[1].sources[5][0]
    file = (store / opened.shards[shard].file).resolve()
    before = file.stat()
    with file.open("r+b") as handle:
        handle.seek(start)
        byte = handle.read(1)[0]
        handle.seek(start)
        handle.write(bytes([byte ^ 4]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert CliRunner().invoke(app, ["verify", str(store)]).exit_code == 1  # the time of the change remains
    manifest = json.loads((store / MANIFEST).read_text())
    manifest["shards"][shard]["ctime_ns"] = file.stat().st_ctime_ns  # as if the disk had flipped it
    (store / MANIFEST).write_text(json.dumps(sealed(manifest)))
    assert verify(open_store(store)) == Verification(("expert 5 of model.layers.1.mlp.experts",), True)


def test_indexing_parses_a_tensor_once_and_looks_a_parameter_up_once(tmp_path):
    """What opening a checkpoint of 60 layers by 256 experts takes is what is done for each tensor."""

    def calls(num_experts: int) -> dict[str, int]:
        folder, theirs = tmp_path / f"{num_experts}", config("qwen3_moe")
        theirs.num_experts = num_experts
        model = AutoModelForCausalLM.from_config(theirs)
        model.save_pretrained(folder, max_shard_size="20KB")
        files = list(folder.glob("*.safetensors"))
        found = {"files": len(files), "tensors": sum(len(load_file(file)) for file in files)}
        profile = cProfile.Profile()
        profile.runcall(index_in_place, folder, tmp_path / f"store-{num_experts}")
        for entry in profile.getstats():
            if not isinstance(entry.code, str):
                found[entry.code.co_name] = found.get(entry.code.co_name, 0) + entry.callcount
        return found

    few, more = calls(8), calls(16)
    for found in (few, more):
        assert found["read_header"] == found["files"] > 2
        assert found["_entry"] == found["tensors"]
    assert few["get_parameter"] == more["get_parameter"]


def test_garbage_is_collected_again_after_indexing(sharded, tmp_path):
    index_in_place(sharded, tmp_path / "store")
    assert gc.isenabled()
    with pytest.raises(MelinoeError):
        index_in_place(sharded, sharded)
    assert gc.isenabled()
