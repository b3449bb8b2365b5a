"""The settings of tuning are written once: the command line, recipes, sweeps and resuming derive from
them."""

from __future__ import annotations

import inspect

import pytest
import typer
from typer.testing import CliRunner

from melinoe.adapters.peft_folder import Base
from melinoe.cli.main import app
from melinoe.data.encoding import EncodedRows
from melinoe.errors import MelinoeError, refuse_unknown
from melinoe.frontier.points import read_sweep
from melinoe.tuning.recipe import read_recipe
from melinoe.tuning.restart import run_identity
from melinoe.tuning.settings import SETTINGS, TuneSettings
from melinoe.tuning.training_rows import TrainingRows


def options():
    """Of `melinoe tune`, by name."""
    return {option.name: option for option in typer.main.get_command(app).commands["tune"].params}


def test_every_setting_is_an_option_or_for_recipes():
    found = options()
    for name, about in SETTINGS.items():
        assert (name in found) != about.in_recipes_only, name
        assert about.help.endswith(".") and about.if_not_given, name
    for name in found.keys() & SETTINGS.keys():
        assert found[name].opts == [f"--{name.replace('_', '-')}"]
        assert found[name].default is None  # or a recipe could not be told from a default
        assert SETTINGS[name].help in found[name].help


def test_an_option_has_the_bounds_of_its_setting():
    assert CliRunner().invoke(app, ["tune", "--rank", "0"]).exit_code == 2
    assert CliRunner().invoke(app, ["tune", "--distill", "1.5"]).exit_code == 2
    help = " ".join(CliRunner().invoke(app, ["tune", "--help"]).output.split())
    assert "150] [x>=1]" in help and "the objective's] [x>=0]" in help


@pytest.mark.parametrize("name", [name for name, about in SETTINGS.items() if about.default is not None])
def test_what_is_said_of_a_default_is_the_default(name):
    about = SETTINGS[name]
    assert about.read(about.if_not_given) == about.default or about.kind is bool


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_steps", 1.5, "max_steps: a value of the wrong kind; got 1.5; allowed: a whole number"),
        ("max_steps", True, "wrong kind"),
        ("max_steps", None, "wrong kind"),
        ("shard", "yes", "wrong kind; got 'yes'; allowed: true | false"),
        ("alpha", "big", "wrong kind; got 'big'; allowed: a number"),
        ("time_limit", 0, "time_limit is out of range; got 0; allowed: above 0"),
        ("alpha", float("nan"), "alpha is out of range; got nan; allowed: above 0"),
        ("alpha", float("inf"), "out of range"),
        ("temperature", 0.0, "out of range; got 0.0; allowed: above 0"),
        ("warmup", 1.0, "allowed: 0 .. 1"),
        ("target_hit_rate", 1.0, r"allowed: between 0 and 1 \(1% is 0.01\)"),
        ("slots", 0, "allowed: 1 or more"),
        ("batch_tokens", 255, r"allowed: max_length \(256\) or more"),
        ("dtype", "float16", r"unknown dtype; got float16; allowed: float32 \| auto"),
        ("objective", 3, "objective: a value of the wrong kind"),
    ],
)
def test_wrong_values_are_named_with_what_is_allowed(name, value, message):
    with pytest.raises(MelinoeError, match=message):
        TuneSettings(**{name: value})


def test_texts_that_stand_for_numbers(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("target_hit_rate: 85%\nlearning_rate: 1e-4\nmax_steps: 1e3\ndata: 1e3\n")
    assert read_recipe(file) == {
        "target_hit_rate": 0.85, "learning_rate": 1e-4, "max_steps": 1000, "data": "1e3"
    }  # fmt: skip
    file.write_text("max_quality_loss: a little")
    with pytest.raises(MelinoeError, match="not a share"):
        read_recipe(file)
    file.write_text("max_steps: 0")
    with pytest.raises(MelinoeError, match=r"r\.yaml: tune: max_steps is out of range; got 0"):
        read_recipe(file)


def test_a_name_of_before_is_still_read(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("time_limit_seconds: 20")
    assert read_recipe(file) == {"time_limit": 20}
    points, _ = read_sweep([{"name": "a", "time_limit_seconds": 5}], {"time_limit": 7})
    assert [point.settings["time_limit"] for point in points] == [7, 5]
    assert TuneSettings.named({"time_limit_seconds": 3}).time_limit == 3
    with pytest.raises(MelinoeError, match="two names; got time_limit_seconds and time_limit"):
        TuneSettings.named({"time_limit_seconds": 3, "time_limit": 4})


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(MelinoeError, match=r"tune: unknown settings; got 3, lamda; allowed: objective, "):
        TuneSettings.named({"lamda": 1, 3: 1, "rank": 2})
    refuse_unknown({"a": 1}, ["a", "b"], "no mistake")


def test_an_interrupted_run_goes_on_whatever_changes_no_loss():
    free = {"accumulate", "device", "shard", "gradient_checkpointing"}
    free |= {"checkpoint_steps", "eval_steps", "eval_rows"}
    kept = run_identity(
        TuneSettings(), TrainingRows(None, EncodedRows([], [], 0, 0, None), [], 1), Base("a", "b")
    )["settings"]
    assert kept.keys() == SETTINGS.keys() - free
    assert kept.keys() == {name for name, about in SETTINGS.items() if about.changes_losses}


def test_all_settings_are_described():
    assert list(inspect.signature(TuneSettings).parameters) == list(SETTINGS)
