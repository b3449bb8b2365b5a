"""Where a verb may write: never over what is read, and only over what melinoe wrote itself.

Everything is a copy below tmp_path, and what must not change is compared with what it was, byte by byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from families import save_checkpoint
from melinoe.adapters.merge import merge
from melinoe.cli.main import app
from melinoe.errors import MelinoeError
from melinoe.files import whole_file, whole_folder
from melinoe.measure.trace import trace
from melinoe.outputs import Output, carded_folder, json_file, tensor_file
from melinoe.prediction.fit import fit_predictor
from melinoe.routing.trace import TRACE
from melinoe.tuning.tune import tune

CARDED = carded_folder("a thing", "card.json", "melinoe-thing", files=("weights",))
SHORT = {"max_steps": 1, "batch_tokens": 64, "max_length": 32, "rank": 2, "progress": False}


def state(folder: Path) -> dict[str, str]:
    """Everything below a folder: links by where they lead, files by their bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def thing(folder: Path, **card) -> Path:
    folder.mkdir(parents=True)
    (folder / "card.json").write_text(json.dumps({"format": "melinoe-thing", **card}))
    (folder / "weights").write_text("1")
    return folder


# ------------------------------------------------------------------ the rule


@pytest.mark.parametrize(
    ("output", "how"),
    [
        ("model", "is"),
        ("model/../model", "is"),
        ("link", "is"),
        ("model/new", "lies in"),
        ("model/a/b/c", "lies in"),
        ("link/new", "lies in"),
        (".", "contains"),
        ("shards", "contains"),  # what the links in the model folder point to
        ("rows.jsonl", "is"),
        ("rows-link.jsonl", "is"),
    ],
)
def test_what_is_read_is_not_written(tmp_path, output, how):
    thing(tmp_path / "model")
    thing(tmp_path / "shards")
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "shards" / "weights")
    (tmp_path / "link").symlink_to(tmp_path / "model", target_is_directory=True)
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "rows-link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    reads = {"model": str(tmp_path / "model"), "data": [tmp_path / "rows.jsonl", "organisation/hub"]}
    kind = TRACE if output.endswith("jsonl") else CARDED
    for replace in (None, False, True):
        with pytest.raises(MelinoeError, match=f" {how} the (model|data) that is read; got "):
            Output(tmp_path / output, kind, reads, replace).check()
    Output(tmp_path / "elsewhere" / "new", CARDED, reads).check()
    Output(tmp_path / "elsewhere" / "trace", TRACE, reads).check()


def test_only_what_melinoe_wrote_is_replaced(tmp_path):
    ours = thing(tmp_path / "ours")
    Output(ours, CARDED, replace=True).check()
    with pytest.raises(MelinoeError, match=r"exists already; .*overwrite it \(--overwrite\)"):
        Output(ours, CARDED, replace=False).check()
    with pytest.raises(MelinoeError, match=r"exists already; choose another folder$"):
        Output(ours, CARDED).check()
    (ours / "notes.md").write_text("mine")
    with pytest.raises(MelinoeError, match=r"not replaced; got notes.md, which melinoe did not write"):
        Output(ours, CARDED, replace=True).check()
    listed = thing(tmp_path / "listed", files=["weights", "log"])
    (listed / "log").write_text("")
    Output(listed, CARDED, replace=True).check()
    other = thing(tmp_path / "other")
    for card in ('{"format": "melinoe-store"}', "[]", "{", "\xff"):
        (other / "card.json").write_text(card, encoding="latin-1")
        with pytest.raises(MelinoeError, match=r"got a folder without the card\.json of a thing"):
            Output(other, CARDED, replace=True).check()
    (tmp_path / "empty").mkdir()
    Output(tmp_path / "empty", CARDED).check()


def test_files_are_known_by_their_format(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    kind, file = tensor_file("a trace", "melinoe-trace"), tmp_path / "file"
    for metadata, same in (({"format": "melinoe-trace"}, True), ({"format": "pt"}, False), (None, False)):
        save_file({"a": np.zeros(1)}, file, metadata)
        assert (kind.foreign(file) == "") is same
    for content in (b"", b"text", b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises(MelinoeError, match="not replaced; got a file that is not a trace"):
            Output(file, kind, replace=True).check()
    kind = json_file("a result", "melinoe-demo")
    for content, same in (('{"format": "melinoe-demo"}', True), ('{"format": 1}', False), ("3", False)):
        file.write_text(content)
        assert (kind.foreign(file) == "") is same


def test_files_and_folders_in_each_others_place(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    thing(tmp_path / "folder")
    for path, kind, message in (
        ("notes.txt", CARDED, "notes.txt is a file; allowed: a folder"),
        ("folder", TRACE, "folder is a folder; allowed: a file"),
        ("notes.txt/new", CARDED, r"cannot be made; got .*notes.txt, which is a file; allowed: a folder"),
        ("notes.txt/a/b", TRACE, r"cannot be made; got .*notes.txt, which is a file; allowed: a folder"),
    ):
        with pytest.raises(MelinoeError, match=message):
            Output(tmp_path / path, kind, replace=True).check()
    with pytest.raises(MelinoeError, match="/dev/null is no plain file"):
        Output(Path("/dev/null"), TRACE, replace=True).check()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MelinoeError, match="pipe is no plain file"):
        Output(tmp_path / "pipe", TRACE, replace=True).check()


def test_what_appears_while_the_work_is_done_stays(tmp_path):
    """Hours later the rule is asked again, and neither the user's folder nor the work is lost."""

    def during(manager, write, appear):
        with manager as new:
            write(new)
            appear()

    def appear():
        output.path.mkdir()
        (output.path / "thesis.txt").write_text("mine")

    output = Output(tmp_path / "output", CARDED, replace=True)
    output.check()
    with pytest.raises(MelinoeError, match=r"not replaced.*what was made is in .*output.melinoe-new"):
        during(whole_folder(output.path, output.check), lambda new: (new / "weights").write_text("2"), appear)
    assert (output.path / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "output.melinoe-new" / "weights").read_text() == "2"
    file = Output(tmp_path / "trace", TRACE, replace=True)
    with pytest.raises(MelinoeError, match=r"not replaced.*what was made is in .*trace\..*melinoe-new"):
        during(whole_file(file.path, file.check), Path.touch, lambda: file.path.write_text("mine"))
    assert file.path.read_text() == "mine"
    assert len(list(tmp_path.glob("trace.*.melinoe-new"))) == 1


# ------------------------------------------------------------------ the verbs


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model, rows, an adapter, a trace and a predictor, to be copied."""
    folder = tmp_path_factory.mktemp("original")
    save_checkpoint(folder / "model", "olmoe")
    (folder / "data").mkdir()
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3} w{i + 4}"} for i in range(14)]
    for split in ("train", "valid", "test"):
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text("max_steps: 1\nbatch_tokens: 64\nmax_length: 32\nrank: 2\n")
    (folder / "points.json").write_text(json.dumps({"points": [{"name": "a"}]}))
    tune(folder / "model", folder / "data", folder / "adapter", **SHORT)
    trace(folder / "model", folder / "data", folder / "trace", progress=False)
    fit_predictor(folder / "model", folder / "trace", folder / "predictor")
    return folder


@pytest.fixture
def here(original, tmp_path):
    """A copy beside a document that is nobody's business."""
    folder = tmp_path / "here"
    shutil.copytree(original, folder)
    (folder / "papers").mkdir()
    (folder / "papers" / "thesis.txt").write_text("years of work")
    return folder


def arguments(verb: str, here: Path) -> tuple[list[str], str]:
    """(what a verb reads, its option for the output)."""
    model = ["--model", here / "model"]
    data = ["--data", here / "data"]
    given = {
        "merge": (["merge", *model, "--adapter", here / "adapter", "--overwrite"], "--output-dir"),
        "tune": (["tune", *model, *data, "--recipe", here / "recipe.yaml", "--overwrite"], "--output-dir"),
        "convert": (["convert", "--adapter", here / "adapter", here / "model"], ""),
        "trace": (["trace", *model, "--adapter", here / "adapter", *data], "--output"),
        "fit-predictor": (["fit-predictor", *model, "--trace", here / "trace"], "--output"),
        "demo": (["demo", *model, *data, "--limit", 8], "--output-dir"),
        "sweep": (["tune", "--sweep", here / "points.json", *model, *data], "--output-dir"),
    }[verb]
    return list(map(str, given[0])), given[1]


def run(verb: str, here: Path, output: str):
    given, option = arguments(verb, here)
    place = str(here / output)
    return CliRunner().invoke(app, [*given, *([option, place] if option else [place])])


VERBS = ("merge", "tune", "convert", "trace", "fit-predictor", "demo", "sweep")
READ = {
    "merge": ("model", "adapter"),
    "tune": ("model", "data", "recipe.yaml"),
    "convert": ("model", "adapter"),
    "trace": ("model", "data", "adapter"),
    "fit-predictor": ("model", "trace"),
    "demo": ("model", "data"),
    "sweep": ("model", "data", "points.json"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_harms_what_it_reads(here, verb):
    before = state(here)
    (here.parent / "link").symlink_to(here, target_is_directory=True)
    names = READ[verb]
    places = [*names, *(f"{name}/inside" for name in names if "." not in name and name != "trace"), "."]
    for place in [*places, *(f"../link/{name}" for name in names)]:
        found = run(verb, here, place)
        assert found.exit_code == 1, (place, found.output)
        assert len(found.output.strip().splitlines()) == 1, found.output
        assert "unexpected" not in found.output
        assert "that is read; got" in found.output
        assert state(here) == before, (place, found.output)


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_harms_what_is_not_melinoes(here, verb):
    """An unrelated folder, a document, a folder where a file belongs and the other way round."""
    before = state(here)
    (here.parent / "photos").mkdir()
    for place in ("papers", "papers/thesis.txt", "papers/thesis.txt/new", "../photos"):
        if (verb, place) in (("demo", "papers"), ("demo", "../photos")):
            continue  # it only adds names of its own to a folder
        if place == "../photos" and verb not in ("trace", "fit-predictor"):
            continue  # an empty folder is a fine place for a folder
        found = run(verb, here, place)
        assert found.exit_code == 1, (place, found.output)
        assert len(found.output.strip().splitlines()) == 1, found.output
        assert str(here / place).split("/new")[0] in found.output
        assert "unexpected" not in found.output
        assert state(here) == before, (place, found.output)


def test_folders_with_names_like_ours_are_not_harmed(here):
    """What an earlier melinoe took for leftovers of its own."""
    for name in ("out.partial", "out.new", "out.old", "out.tmp"):
        (here / name).mkdir()
        (here / name / "thesis.txt").write_text(name)
    before = state(here)
    for verb in ("merge", "tune", "convert"):
        place = "out"
        assert run(verb, here, place).exit_code == 0
        shutil.rmtree(here / "out")
    assert state(here) == before


def test_what_melinoe_wrote_is_replaced(here):
    """And nothing but it: a file that somebody put beside it stops the call."""
    others = {name: value for name, value in state(here).items() if not name.startswith(("out", "trace"))}
    for verb in ("merge", "tune"):
        assert run(verb, here, "out").exit_code == 0
        first = (here / "out").stat().st_ino
        found = run(verb, here, "out")
        assert found.exit_code == 0, found.output
        assert (here / "out").stat().st_ino != first
        (here / "out" / "notes.txt").write_text("mine")
        found = run(verb, here, "out")
        assert found.exit_code == 1
        assert "got notes.txt, which melinoe did not write" in found.output
        assert (here / "out" / "notes.txt").read_text() == "mine"
        shutil.rmtree(here / "out")
    for verb, own, other in (("trace", "trace", "predictor"), ("fit-predictor", "predictor", "out")):
        shutil.copy(here / own, here / "out")
        found = run(verb, here, "out")
        assert found.exit_code == 0, found.output
        if other != "out":
            found = run(verb, here, other)
            assert "not replaced; got a file that is not a trace" in found.output
    assert not list(here.glob("*melinoe-*"))
    assert {name: value for name, value in state(here).items() if name in others} == others


def test_of_two_kinds_neither_replaces_the_other(here):
    assert run("merge", here, "merged").exit_code == 0
    before = state(here)
    assert "got a folder without the melinoe.json of an adapter" in run("tune", here, "merged").output
    found = run(
        "merge", here, "adapter-copy" if shutil.copytree(here / "adapter", here / "adapter-copy") else ""
    )
    assert "got a folder without the melinoe-merged.json of a merged checkpoint" in found.output
    shutil.rmtree(here / "adapter-copy")
    assert state(here) == before


def test_a_merge_that_fails_leaves_the_old_one(here):
    """The old goes when the new one is complete, not before."""
    assert run("merge", here, "merged").exit_code == 0
    (here / "adapter" / "adapter_model.safetensors").write_bytes(b"cut short")
    before = state(here)
    found = run("merge", here, "merged")
    assert found.exit_code == 1 and "cannot read the adapter" in found.output
    assert state(here) == before


def test_the_demo_replaces_its_own_names_only(here):
    for name, content in (("result.json", "{}"), ("report.html", "<html>"), ("predictor", "x")):
        (here / "out").mkdir()
        (here / "out" / name).write_text(content)
        before = state(here)
        found = run("demo", here, "out")
        assert found.exit_code == 1 and f"{name} exists already and is not replaced" in found.output
        assert state(here) == before
        shutil.rmtree(here / "out")
    (here / "out" / "tuned").mkdir(parents=True)
    (here / "out" / "tuned" / "thesis.txt").write_text("years of work")
    found = run("demo", here, "out")
    assert "tuned exists already and is not replaced" in found.output


def test_a_sweep_knows_its_own_folder(here):
    (here / "out" / "points" / "bezier").mkdir(parents=True)
    (here / "out" / "points" / "bezier" / "curve.svg").write_text("mine")
    before = state(here)
    found = run("sweep", here, "out")
    assert "not replaced; got points/bezier, which is no run of a sweep" in found.output
    assert state(here) == before


def test_merging_in_python_follows_the_same_rule(here):
    with pytest.raises(MelinoeError, match="is the model that is read"):
        merge(here / "model", here / "adapter", here / "model", overwrite=True)
    with pytest.raises(MelinoeError, match="is the adapter that is read"):
        merge(here / "model", here / "adapter", here / "adapter", overwrite=True)


# ------------------------------------------------------------------ no room


@pytest.fixture
def full_disk():
    """No file of this process grows beyond a few bytes: what a full disk does, without one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def full(size=256):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return full


@pytest.mark.parametrize("verb", VERBS)
def test_no_room_names_the_place(here, verb, full_disk):
    """One plain line with the path, nothing half written, and with room again the same call ends well."""
    if verb == "demo":
        pytest.skip("its processes are the verbs above")
    before = state(here)
    with full_disk():
        found = run(verb, here, "out")
    assert found.exit_code == 1, found.output
    line = found.output.strip().splitlines()[-1]
    assert line.startswith(f"melinoe: cannot write {here / 'out'}"), found.output
    assert "file too large" in line and "unexpected" not in line
    left = {name for name in state(here) if name not in before}
    assert all("melinoe-partial" in name or verb == "sweep" for name in left), left
    assert {name: value for name, value in state(here).items() if name in before} == before
    if verb != "sweep":
        assert run(verb, here, "out").exit_code == 0


def test_no_room_keeps_the_old_one(here, full_disk):
    places = {"merge": "merged", "tune": "tuned", "fit-predictor": "predictor", "trace": "trace"}
    for verb, place in places.items():
        assert run(verb, here, place).exit_code == 0
        before = state(here)
        with full_disk():
            assert run(verb, here, place).exit_code == 1
        after = {name: value for name, value in state(here).items() if "melinoe-partial" not in name}
        assert after == before
