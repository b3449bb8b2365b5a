"""What the options of the verbs must not accept in silence: numbers that mean nothing, more than there is."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import melinoe
from melinoe.cli.main import app
from melinoe.errors import MelinoeError
from melinoe.machine import free_memory, total_memory
from melinoe.tuning.settings import MAX_RUN_TOKENS, TuneSettings


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}"} for i in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def said(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code in (1, 2), done.output
    assert "unexpected" not in done.output and done.stdout == ""
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("slots", [1000, 9, -1])
def test_slots_that_no_layer_has(olmoe_store, slots):
    generate = ("generate", "--model", olmoe_store, "-p", "w1")
    for verb in (generate, ("plan", "--model", olmoe_store)):
        message = said(*verb, "--slots", slots)
        assert message == (
            f"melinoe: slots does not suit this model; got {slots}; allowed: 0 to 8, the experts of a layer"
        )
    with pytest.raises(MelinoeError, match="slots does not suit"):
        melinoe.load(olmoe_store, slots=slots)
    assert "does not suit" in said(
        "tune", "--model", olmoe_store, "--data", "tiny", "--slots", 1000, "--dry-run"
    )


def test_more_memory_than_there_is(olmoe, olmoe_store, data, tmp_path):
    assert free_memory() <= total_memory()
    wanted = "the memory budget is more than this machine has; got 999TiB; allowed: up to "
    assert wanted in said("generate", "--model", olmoe_store, "-p", "w1", "--memory", "999TiB")
    tune = ("tune", "--model", olmoe, "--data", data, "--output-dir", tmp_path / "a")
    assert wanted in said(*tune, "--memory", "999TiB", "--quiet")
    assert not list(tmp_path.iterdir())
    with pytest.raises(MelinoeError, match="more than this machine has"):
        melinoe.load(olmoe_store, memory=10**15)
    # a plan may be for another machine
    assert CliRunner().invoke(app, ["plan", "--model", str(olmoe_store), "--memory", "900GiB"]).exit_code == 0


def test_numbers_out_of_every_range(olmoe_store, data, tmp_path):
    tune = ("tune", "--model", olmoe_store, "--data", data, "--output-dir", tmp_path / "a")
    for seed in (-1, 2**32):
        assert "--seed" in said(*tune, "--seed", seed)
        assert "--seed" in said("generate", "--model", olmoe_store, "-p", "w1", "--seed", seed)
    for temperature in ("inf", "nan", "1e9", "-1"):
        assert "--temperature" in said(
            "generate", "--model", olmoe_store, "-p", "w1", "--temperature", temperature
        )
    for option in ("--max-steps", "--batch-tokens", "--accumulate"):
        assert "more than a run is planned for; got " in said(*tune, option, 10**12)
    assert "no such recipe; got" in said("tune", "--recipe", tmp_path)
    assert "unknown device" in said("generate", "--model", olmoe_store, "-p", "w1", "--device", "")
    (tmp_path / "held-out").mkdir()
    held_out = ("--eval-steps", 1, "--eval-data", tmp_path / "held-out")
    assert "no valid.jsonl in data folder" in said(*tune, *held_out)
    TuneSettings(max_steps=MAX_RUN_TOKENS // 2048)
    with pytest.raises(MelinoeError, match=r"seed is out of range; got -1; allowed: 0 \.\. 4,294,967,295"):
        TuneSettings(seed=-1)
