"""Recipes: every file of recipes/ loads, mistakes are named, and the command line wins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from families import save_checkpoint
from melinoe.cli.main import app
from melinoe.errors import MelinoeError
from melinoe.tuning.recipe import WHERE, read_recipe
from melinoe.tuning.settings import TuneSettings

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def test_there_are_recipes():
    names = {file.stem for file in RECIPES}
    papers = {f"paper-{model}-{data}" for model in ("olmoe", "phi", "mixtral") for data in ("dolly", "gsm8k")}
    assert papers < names


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_loads(file):
    found = read_recipe(file)
    settings = TuneSettings(**{key: value for key, value in found.items() if key not in WHERE})
    assert found["model"] and found["data"]
    for name in settings.as_dict().keys() & found.keys():
        assert getattr(settings, name) == found[name]
    header = file.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    if file.stem.startswith("paper-"):
        assert settings.objective == "paper" and (settings.gamma, settings.rho) == (0.9, 0.1)
        assert "guess" in file.read_text()
    else:
        assert "Result" in header


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lamda_cs: 0.5", "unknown settings; got lamda_cs"),
        ("max_steps: 0", "max_steps is out of range"),
        ("max_steps: many", "wrong kind"),
        ("objective: fast", "unknown objective"),
        ("- model", "is not a recipe"),
        ("model: [", "is not YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(MelinoeError, match=message):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(MelinoeError, match="no such recipe"):
        read_recipe(tmp_path / "other.yaml")


def test_numbers_as_people_write_them(tmp_path):
    (tmp_path / "r.yaml").write_text("learning_rate: 1e-5\ndata: folder\nrank: 8")
    assert read_recipe(tmp_path / "r.yaml") == {"learning_rate": 1e-5, "data": "folder", "rank": 8}


def test_the_command_line_wins(tmp_path):
    base = save_checkpoint(tmp_path / "base", "olmoe")
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}"} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"model": str(base), "data": str(tmp_path / "train.jsonl"), "max_steps": 5, "rank": 3}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    command = ["tune", "--recipe", str(tmp_path / "r.yaml"), "--output-dir", str(tmp_path / "a")]
    done = CliRunner().invoke(app, [*command, "--max-steps", "2", "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 2
    assert json.loads((tmp_path / "a" / "melinoe.json").read_text())["settings"]["rank"] == 3
    assert CliRunner().invoke(app, ["tune", "--output-dir", str(tmp_path / "b")]).exit_code == 2
