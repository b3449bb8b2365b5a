"""Faults that really happen: processes killed, files cut short, disks that fill, two users of one store."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

import melinoe
from melinoe.conversion.verify import damaged_records
from melinoe.demonstration.widen import widen
from melinoe.models.folder import resolve_model
from melinoe.runtime.load import load_tokenizer
from melinoe.store.manifest import open_store

PROMPT = "sort 31,58,18,28"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The embedded model with records of 1 MiB: large enough for a convert that can be interrupted."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    widen(resolve_model("tiny"), folder, 2**20, 0)
    return folder


def verb(*arguments, **settings):
    return subprocess.Popen(
        [sys.executable, "-m", "melinoe", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings,
    )  # fmt: skip


def test_kill_9_at_any_point_of_convert(wide, tmp_path):
    """The next call goes on behind what was finished, and no half store ever loads."""
    target, partial = tmp_path / "store", tmp_path / "store.melinoe-partial"
    moments = {
        "first bytes of the first layer": lambda: any(partial.glob("experts-00000*")),
        "third layer": lambda: any(partial.glob("experts-00002*")),
        "resident weights": lambda: (partial / "resident.safetensors").exists(),
    }  # the manifest comes last, whole, right before the folder gets its name
    for moment, reached in moments.items():
        process = verb("convert", wide, target, "--quiet")
        while not reached() and process.poll() is None:
            time.sleep(0.0005)
        assert process.poll() is None, f"convert ended before {moment}: {process.stderr.read()}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not target.exists(), moment
        with pytest.raises(melinoe.MelinoeError):
            melinoe.load(partial, slots=8)
        finished = sorted(path.name for path in partial.glob("experts-*.safetensors"))
        stamps = {name: (partial / name).stat().st_mtime_ns for name in finished[:-1]}
    process = verb("convert", wide, target, "--quiet")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert {name: (target / name).stat().st_mtime_ns for name in stamps} == stamps  # not written again
    assert not list(damaged_records(open_store(target)))
    expected = melinoe.convert(wide, tmp_path / "undisturbed", progress=False)
    for index, layer in enumerate(expected.layers):
        assert layer.checksums == open_store(target).layers[index].checksums


def test_record_files_cut_short_while_generating(tiny_store, tmp_path):
    """A clear error, and every token before it is right."""
    tokenizer = load_tokenizer("tiny")
    expected = melinoe.generate(melinoe.load(tiny_store, slots=32), tokenizer, PROMPT, max_new_tokens=24)[0]
    store = open_store(shutil.copytree(tiny_store, tmp_path / "store"))
    read: list[str] = []

    def generate():
        model = melinoe.load(store.folder, slots=4)
        for count, piece in enumerate(melinoe.stream_generate(model, tokenizer, PROMPT, max_new_tokens=24)):
            read.append(piece.text)
            if count == 3:
                for index in range(len(store.layers)):
                    os.truncate(store.path(index), store.layers[index].offset(1))

    with pytest.raises(melinoe.MelinoeError, match="cannot read expert"):
        generate()
    text = "".join(read)
    assert text
    assert expected.startswith(text)


def test_a_disk_that_fills_while_converting(wide, tmp_path):
    """One line, exit code 1, no store; with room again the next call goes on."""
    target = tmp_path / "store"

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 2**20, 20 * 2**20))

    process = verb("convert", wide, target, "--quiet", preexec_fn=small_files_only)
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert errors.startswith("melinoe: ")
    assert not target.exists()
    process = verb("convert", wide, target, "--quiet")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert not list(damaged_records(open_store(target)))


def test_two_processes_on_one_store(tiny_store):
    expected = melinoe.generate(
        melinoe.load(tiny_store, slots=32), load_tokenizer("tiny"), PROMPT, max_new_tokens=24
    )[0]
    processes = [
        verb("generate", "--model", tiny_store, "--slots", slots, "--max-new-tokens", 24, "-p", PROMPT)
        for slots in (8, 3)
    ]
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert output.strip() == expected.strip()


def test_two_processes_on_first_use(wide, tmp_path):
    """Both ask for a checkpoint that has no store yet: one makes it, the other waits, both answer alike."""
    settings = {"env": {**os.environ, "MELINOE_HOME": str(tmp_path / "home")}}
    arguments = ["generate", "--model", wide, "--slots", 8, "--max-new-tokens", 8, "-p", PROMPT]
    processes = [verb(*arguments, **settings) for _ in range(2)]
    outputs = []
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        outputs.append(output)
    assert outputs[0] == outputs[1]
    assert outputs[0].strip()
