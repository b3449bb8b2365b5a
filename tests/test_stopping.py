"""Ctrl-C and what comes after it: the last line says what is kept, and what is kept is not lost unsaid."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from families import save_checkpoint
from interrupting import interrupted_at
from melinoe.cli.main import app
from melinoe.conversion import convert as conversion
from melinoe.errors import MelinoeError
from melinoe.runtime import generation
from melinoe.tuning.trainer import LocalityTrainer
from melinoe.tuning.tune import tune

SHORT = {"max_steps": 5, "batch_tokens": 64, "max_length": 32, "rank": 2, "checkpoint_steps": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base") / "model", "olmoe")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}"} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def interrupted(base, data, tmp_path_factory):
    """A folder with a run that was stopped in its fourth step; copy it before you use it."""
    folder = tmp_path_factory.mktemp("interrupted")
    with interrupted_at(4):
        tune(base, data, folder / "adapter", progress=False, **SHORT)
    return folder


def stopped(monkeypatch, place, name, *arguments):
    """The last line of a verb in which `place.name` is where Ctrl-C arrives."""

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, name, stop)
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 130, done.output
    return done.stderr.splitlines()[-1]


def test_a_generation_keeps_nothing(base, monkeypatch):
    said = stopped(
        monkeypatch, generation, "stream_generate", "generate", "--model", base, "-p", "w1", "--slots", 4
    )
    assert said == "melinoe: stopped; nothing is kept to go on with"


def test_a_conversion_keeps_what_it_wrote(base, monkeypatch, tmp_path):
    early = stopped(monkeypatch, conversion, "_write_experts", "convert", base, tmp_path / "a", "--quiet")
    assert early == "melinoe: stopped; nothing is kept to go on with"
    monkeypatch.undo()
    late = stopped(monkeypatch, conversion, "write_resident", "convert", base, tmp_path / "b", "--quiet")
    work = tmp_path / "b.melinoe-partial"
    assert late == f"melinoe: stopped; what is written is kept in {work}, and the same call goes on"
    monkeypatch.undo()
    again = CliRunner().invoke(app, ["convert", str(base), str(tmp_path / "b"), "--quiet"])
    assert again.exit_code == 0 and not (tmp_path / "b.melinoe-partial").exists()


def test_tuning_keeps_what_it_saved(base, data, interrupted, monkeypatch, tmp_path):
    work = tmp_path / "adapter.melinoe-partial"
    shutil.copytree(interrupted / "adapter.melinoe-partial", work)
    (tmp_path / "r.yaml").write_text(json.dumps({**SHORT, "model": str(base), "data": str(data)}))
    command = ["tune", "--recipe", tmp_path / "r.yaml", "--quiet", "--output-dir"]
    said = stopped(monkeypatch, LocalityTrainer, "compute_loss", *command, tmp_path / "adapter")
    assert said == f"melinoe: stopped; the first 2 steps are kept in {work}, and the same call goes on"
    said = stopped(monkeypatch, LocalityTrainer, "compute_loss", *command, tmp_path / "other")
    assert said == "melinoe: stopped; nothing is kept to go on with"
    monkeypatch.undo()
    done = CliRunner().invoke(app, [*map(str, command), str(tmp_path / "adapter"), "--json"])
    assert json.loads(done.stdout.splitlines()[-1])["resumed_from"] == 2


def test_another_run_is_refused_before_it_replaces_what_was_saved(base, data, interrupted, tmp_path):
    shutil.copytree(interrupted / "adapter.melinoe-partial", tmp_path / "adapter.melinoe-partial")
    saved = sorted(tmp_path.rglob("*"))
    options = {"progress": False, **SHORT, "max_steps": 3}
    with pytest.raises(
        MelinoeError, match=r"interrupted run in .*partial is another one; got other max_steps"
    ):
        tune(base, data, tmp_path / "adapter", **options)
    (tmp_path / "adapter.melinoe-partial" / "run.json").write_text("{")  # it cannot be told: not lost either
    with pytest.raises(MelinoeError, match="another one"):
        tune(base, data, tmp_path / "adapter", **options)
    assert sorted(tmp_path.rglob("*")) == saved
    assert tune(base, data, tmp_path / "adapter", overwrite=True, **options)["resumed_from"] is None


def test_a_device_that_is_not_there_is_refused(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MelinoeError, match="no CUDA device on this machine; got cuda; allowed: cpu"):
        tune(base, data, tmp_path / "adapter", device="cuda", progress=False, **SHORT)
    assert not list(tmp_path.iterdir())
