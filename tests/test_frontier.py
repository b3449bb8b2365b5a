"""A sweep: its points and rows, the tables by hand, and one end to end that is killed and goes on."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import melinoe
from melinoe.adapters.merge import merge
from melinoe.cli.main import app
from melinoe.errors import MelinoeError
from melinoe.frontier.held_out import evenly, held_out_only, hold_out
from melinoe.frontier.points import Point, read_sweep
from melinoe.frontier.run_point import Job
from melinoe.frontier.runs import Run, run_all
from melinoe.frontier.sources import measuring_code, sources_of, tuning_code
from melinoe.frontier.sums import Sums, compare, pooled, summary
from melinoe.frontier.sweep import _pool
from melinoe.frontier.table import best_within, markdown, origins_table, sentences
from melinoe.measure.quality import evaluate
from melinoe.measure.trace import trace
from melinoe.routing.concentration import load_entropy
from melinoe.routing.policies import DECODE
from melinoe.routing.simulate import simulate
from melinoe.tuning.objectives import OBJECTIVES
from melinoe.tuning.settings import TuneSettings
from melinoe.verbs import Stages

SWEEPS = sorted((Path(__file__).parents[1] / "benchmarks" / "sweeps").glob("*.yaml"))


def write_rows(folder, split, numbers, words="w"):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": f"{words}{i} w{i + 1}", "completion": f"w{i + 2} {words}{i + 3} w{i + 4}"} for i in numbers
    ]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_held_out_rows_are_not_trained_on(tmp_path):
    for name, start in (("a", 0), ("b", 20)):
        write_rows(tmp_path / name, "train", range(start, start + 10))
        write_rows(tmp_path / name, "test", range(start + 10, start + 14))
    train, test, origin = hold_out([tmp_path / "a", tmp_path / "b"], 3, None)
    first = [[int(json.loads(line)["prompt"].split()[0][1:]) for line in lines] for lines in (train, test)]
    assert first[0] == [*range(7), *range(20, 27)]
    assert first[1] == [*range(10, 14), *range(7, 10), *range(30, 34), *range(27, 30)]
    assert hold_out([tmp_path / "a", tmp_path / "b"], 3, 7).test == test[::2]
    assert origin == [str(tmp_path / name) for name in "ab" for _ in range(7)]
    assert evenly(["a", "b", "c"], 2) == ["a", "b"]
    assert held_out_only(tmp_path / "a", None) == test[:4]
    with pytest.raises(MelinoeError, match=r"left to train on; got --hold-out 10 of 10 rows"):
        hold_out([tmp_path / "a"], 10, None)
    with pytest.raises(MelinoeError, match=r"no held-out rows.*--hold-out"):
        hold_out([tmp_path / "a" / "train.jsonl"], 0, None)


def test_points_of_a_file(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "common: {max_steps: 7, learning_rate: 2e-4}\n"
        "measure: {slots: [4, 8]}\n"
        "points:\n"
        "  - {name: strong, lambda_cs: 0.5, max_steps: 9}\n"
        "  - {name: paper x2, objective: paper, curve: theirs}\n"
    )
    (control, strong, paper), measure = read_sweep(file)
    assert measure == {"slots": [4, 8]}
    assert (control.name, strong.name, paper.name) == ("control", "strong", "paper x2")
    assert control.settings["lambda_cs"] == control.settings["lambda_rm"] == 0
    assert control.settings["max_steps"] == 7
    settings = strong.tune_settings(3)
    assert (settings.seed, settings.max_steps, settings.lambda_cs) == (3, 9, 0.5)
    assert settings.learning_rate == 2e-4  # a text to YAML
    assert (strong.curve, paper.curve) == (TuneSettings().objective, "theirs")
    assert [p.settings["max_steps"] for p in read_sweep(file, {"max_steps": 11})[0]] == [11, 9, 11]
    own = [{"name": "b"}, {"name": "control", "rank": 2}]
    assert [point.name for point in read_sweep(own)[0]] == ["control", "b"]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_the_sweeps_of_the_results_are_readable(file):
    points, _ = read_sweep(file)
    assert points[0].name == "control" and len(points) > 1
    assert file.read_text().startswith("# ") and f"--sweep benchmarks/sweeps/{file.name}" in file.read_text()


def test_default_points_know_every_objective():
    points, _ = read_sweep("default")
    assert points[0].name == "control"
    assert {point.tune_settings(0).objective for point in points} == set(OBJECTIVES)
    assert len(points) == len(OBJECTIVES) + 4  # the default one at four weights; control


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([{"name": "a", "lambda": 1}], "point a: unknown settings; got lambda"),
        ([{"name": "a", "lambda_cs": -1}], "point a: tune: lambda_cs is out of range; got -1"),
        (
            [{"name": "a", "max_steps": "many"}],
            "point a: tune: max_steps: a value of the wrong kind; got 'many'",
        ),
        ([{"name": "a"}, {"name": "a"}], "two points have the same name; got a"),
        ([{"lambda_cs": 1}], "point 1 has no name"),
        ([{"name": "a", "seed": 3}], "unknown settings; got seed"),
        (["a"], "not a sweep"),
    ],
)
def test_bad_points_are_named(points, message):
    with pytest.raises(MelinoeError, match=message):
        read_sweep(points)


def test_bad_sweep_files_are_named(tmp_path):
    with pytest.raises(MelinoeError, match="no such sweep"):
        read_sweep(tmp_path / "none.yaml")
    for name, text in (
        ("a.yaml", "points: {a: 1}"),
        ("b.json", "{"),
        ("c.yaml", "a: ["),
        ("d.yaml", "points: []\nmeasure: {rows: 3}"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(
            MelinoeError, match=r"(is not a sweep|cannot be read|measure: unknown keys; got rows)"
        ):
            read_sweep(tmp_path / name)


def sums(nll, loads):
    """As a file of measurements holds them."""
    hits = [6.0 - loads[0], 2.0 - loads[1]]
    return {
        "nll": nll,
        "tokens": [4.0, 2.0],
        "decoded": [3.0, 1.0],
        "requests": [6.0, 2.0],
        "replays": [{"policy": "decay", "slots": 4, "loads": loads, "hits": hits}],
        "fixed_sets": [{"slots": 4, "own": [5.0, 2.0], "shared": [3.0, 1.0]}],
    }


def seeds(*measured):
    return pooled([Sums.from_json(one) for one in measured])


def test_seeds_are_pooled_by_adding():
    tuned = seeds(sums([4.0, 2.0], [2.0, 1.0]), sums([5.0, 1.0], [1.0, 0.0]))
    control = seeds(sums([4.0, 2.0], [4.0, 2.0]), sums([4.0, 2.0], [4.0, 2.0]))
    found = summary(tuned)
    assert found["nll"] == 1.0
    assert found["perplexity"] == pytest.approx(math.e)
    assert found["loads"] == [{"policy": "decay", "slots": 4, "loads_per_token": 0.5, "hit_rate": 0.75}]
    assert found["static"] == [{"slots": 4, "own": 7 / 8, "shared": 4 / 8}]
    assert found["to_shared"][0]["ratio"] == 4 / 8  # loads over the requests that the one set does not serve
    ratios = compare(tuned, control)
    assert ratios["loads"][0]["ratio"] == 4 / 12
    assert ratios["perplexity"]["ratio"] == 1.0
    assert ratios["nll"]["ratio"] == 1.0
    one = sums([4.0, 2.0], [2.0, 1.0])
    assert json.loads(json.dumps(Sums.from_json(one).to_json())) == one
    other = one | {"replays": [one["replays"][0] | {"policy": "lru"}]}
    with pytest.raises(AssertionError, match="policy"):
        seeds(one, other)


def fake(name, perplexity, loads):
    """A point of result.json as the tables read it."""
    ratio = {"ratio": perplexity, "low": perplexity - 0.004, "high": perplexity + 0.004}
    entry = {"policy": "decay", "slots": 4, "ratio": loads, "low": loads, "high": loads}
    return {"name": name, "held_out": {"to_control": {"perplexity": ratio, "loads": [entry]}}}


def test_what_a_loss_buys():
    points = [fake("control", 1, 1), fake("a", 1.004, 0.7), fake("b", 1.009, 0.5), fake("c", 1.06, 0.1)]
    result = {"settings": {"policies": ["decay"], "budgets": [4], "slots": 4}, "points": points}
    best = best_within(result, "held_out", 0.01)
    assert (best["name"], best["sure"]) == ("b", False)
    assert best_within(result, "held_out", 0.05)["sure"]
    assert best_within(result, "held_out", 0.001) is None
    one, five = sentences(result, "held_out")
    assert "2.00 times fewer" in one and "reaches beyond the bound" in one
    assert "(b, decay, 4 slots" in five and "beyond" not in five
    assert markdown((["a", "b"], [["x|y", "1"]])) == "| a | b |\n|---|---:|\n| x\\|y | 1 |"


def test_every_data_folder_by_itself():
    """The parts add up to the whole, and nothing is said where it is not known whose a row is."""
    own = {"sums": sums([4.0, 2.0], [2.0, 1.0]), "load_entropy": [0.9]}
    control = {"sums": sums([3.0, 1.0], [4.0, 1.0]), "load_entropy": [1.0]}
    found = _pool([own], [control], ["a", "b"])
    assert found["origins"]["a"]["nll"] == 1.0
    assert found["origins"]["a"]["to_control"]["loads"][0]["ratio"] == 0.5
    assert found["origins"]["b"]["to_control"]["loads"][0]["ratio"] == 1.0
    assert found["origins"]["b"]["to_control"]["nll"]["ratio"] == 2.0
    assert sum(part["num_sequences"] for part in found["origins"].values()) == found["num_sequences"]
    assert "origins" not in _pool([own], [control], ["a", "a"])
    assert "origins" not in _pool([own], [control], ["a", "b", "b"])
    result = {"settings": {"policies": ["decay"], "budgets": [4], "slots": 4}}
    headings, rows = origins_table(result | {"points": [{"name": "p", "held_out": found}]}, "held_out")
    assert [row[:3] for row in rows] == [["p", "a", "1"], ["p", "b", "1"]]
    assert len(headings) == len(rows[0]) and headings[-2:] == ["own - shared", "/ one set"]
    assert rows[0][-2] == f"{(5 - 3) / 6:.3f}" and rows[0][-1].startswith("0.667 (")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder, "train", range(30))
    write_rows(folder, "test", range(30, 42))
    return folder


def test_a_killed_sweep_goes_on(olmoe, data, tmp_path):
    output, file = tmp_path / "sweep", tmp_path / "sweep.json"
    file.write_text(json.dumps({"points": [{"name": "strong", "lambda_cs": 0.5, "learning_rate": 0.01}]}))
    command = ["tune", "--sweep", file, "--model", olmoe, "--data", data, "--output-dir", output, "--json"]
    command += ["--max-steps", 3, "--hold-out", 4, "--limit", 8, "--out-of-domain", data / "train.jsonl"]
    command = [str(part) for part in command]
    process = subprocess.Popen(
        [sys.executable, "-m", "melinoe", *command], stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(output.glob("points/control-*/measured-*.json")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (control,) = output.glob("points/control-*/measured-*.json")
    assert not (output / "result.json").exists()
    finished = control.stat().st_mtime_ns

    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert "control, seed 0: finished before\n" in re.sub(r" \(\d+ s\)", "", again.stderr)
    assert control.stat().st_mtime_ns == finished
    result = json.loads(again.stdout.splitlines()[-1])
    assert result == json.loads((output / "result.json").read_text())
    assert (result["format"], result["version"]) == ("melinoe-frontier", "1")
    assert result["settings"]["rows"] == {"held_out": 8, "out_of_domain": 8}
    first, strong = result["points"]
    one = {"ratio": 1.0, "low": 1.0, "high": 1.0}
    assert first["held_out"]["to_control"]["perplexity"] == one
    assert strong["held_out"]["to_control"]["perplexity"] != one
    assert strong["tuned"][0]["steps"] == 3
    assert strong["code"] == first["code"] == [tuning_code()]
    check_against_the_library(olmoe, output, strong, tmp_path)
    page = (output / "frontier.html").read_text()
    assert page.count("<h3>Other numbers of slots") == 4  # two policies, on each of the data
    assert page.count("<h3>Tuning: ") == 2 and result["points"][1]["curves"]["step"] == [1, 2, 3]
    assert not re.search(r"""(src|href)=["'](?!#)""", page)  # nothing beside the page
    assert "| strong |" in (output / "table.md").read_text()
    assert not list(output.glob("points/*/merged"))


def check_against_the_library(olmoe, output, point, tmp_path):
    """The numbers of the sweep are those of merge, evaluate, trace and simulate."""
    (adapter,) = output.glob("points/strong-*/adapter")
    merge(olmoe, adapter, tmp_path / "merged")
    scored = evaluate(
        str(tmp_path / "merged"), output / "data" / "held_out", metrics="perplexity", progress=False
    )
    measured = point["held_out"]
    assert measured["nll"] == pytest.approx(scored["nll"], rel=1e-6)
    recorded = trace(str(tmp_path / "merged"), output / "data" / "held_out", split="test", progress=False)
    budgets = [entry["slots"] for entry in measured["static"]]
    rows = simulate(recorded, "decay,lru", budgets)["results"]
    assert [row["loads_per_token"] for row in rows] == pytest.approx(
        [row["loads_per_token"] for row in measured["loads"]]
    )
    entropy = load_entropy(recorded.request_counts(DECODE).sum(0))
    assert measured["load_entropy"] == pytest.approx(np.mean(entropy))


def copied_package(tmp_path):
    package = Path(melinoe.__file__).parent
    return shutil.copytree(
        package, tmp_path / "melinoe", ignore=shutil.ignore_patterns("__pycache__", "model")
    )


def test_an_edit_of_any_source_of_tuning_is_seen(tmp_path):
    package = copied_package(tmp_path)
    before = tuning_code(package)
    sources = sources_of("melinoe.tuning.tune", package)
    assert before == tuning_code()  # the place of the package is not in it
    for source in sources:
        original = source.read_bytes()
        source.write_bytes(original + b"# edited\n")
        assert tuning_code(package) != before, source
        source.write_bytes(original)
    for other in ("cli/main.py", "demonstration/demo.py", "frontier/page.py"):
        (package / other).write_text("# edited\n")
    assert tuning_code(package) == before


@pytest.mark.parametrize(
    ("changed", "warned"), [({}, False), ({"measured_by": "older"}, True), ({"code": "older"}, True)]
)
def test_a_finished_run_of_other_code_is_named(tmp_path, capsys, changed, warned):
    folder = tmp_path / "strong"
    folder.mkdir()
    codes = {"code": tuning_code(), "measured_by": measuring_code()}
    (folder / "measured.json").write_text(json.dumps(codes | changed))
    job = Job("model", {}, "train", {}, {}, "measured.json")
    run_all([Run(Point("strong", "counts"), 0, job, folder)], Stages(1), 1)
    assert ("with other code: compare with care" in capsys.readouterr().err) == warned


def test_measuring_code_covers_what_measures(tmp_path):
    package = copied_package(tmp_path)
    before = measuring_code(package)
    for file in ("routing/simulate.py", "adapters/merge.py", "frontier/measuring.py", "models/layers.py"):
        original = (package / file).read_bytes()
        (package / file).write_bytes(original + b"# edited\n")
        assert measuring_code(package) != before, file
        (package / file).write_bytes(original)
    assert measuring_code(package) == before == measuring_code()


def test_no_source_of_tuning_is_forgotten(olmoe, data, tmp_path):
    """What a run really imports is in the list, paged experts and evaluation among it."""
    code = """
        import sys, melinoe
        more = {"memory": "1GiB", "eval_data": sys.argv[4], "eval_steps": 1, "max_steps": 1}
        melinoe.tune(*sys.argv[1:4], progress=False, **more)
        print("\\n".join(m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "melinoe"))
    """
    arguments = [olmoe, data, tmp_path / "a", data / "test.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {Path(line) for line in done.stdout.split()}
    assert len(loaded) > 40
    assert loaded <= set(sources_of("melinoe.tuning.tune"))


def test_mistakes_of_a_sweep_are_one_line(olmoe, data, tmp_path):
    def refused(*arguments):
        found = CliRunner().invoke(app, ["tune", "--model", str(olmoe), "--data", str(data), *arguments])
        assert found.exit_code == 1, found.output
        return found.output.strip()

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    out = ["--output-dir", str(tmp_path / "out")]
    assert "no such sweep; got nowhere.yaml" in refused("--sweep", "nowhere.yaml", *out)
    assert "not a list of seeds; got a" in refused("--sweep", "default", "--seeds", "a", *out)
    assert "seeds; got [0, 0]" in refused("--sweep", "default", "--seeds", "0,0", *out)
    assert "--seeds, --limit can only be given with --sweep" in refused(
        "--seeds", "0,1", "--limit", "5", *out
    )
    assert "--overwrite" in refused("--sweep", "default", "--overwrite", *out)
    assert "without the points of a sweep" in refused(
        "--sweep", "default", "--output-dir", str(tmp_path / "other")
    )
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"points": [{"name": "a"}], "measure": {"policies": ["mru"]}}))
    assert "policies; got ['mru']" in refused("--sweep", str(file), *out)
    assert "no such data" in refused("--sweep", "default", "--out-of-domain", str(tmp_path / "no"), *out)
    assert "slots does not suit this model" in refused("--sweep", "default", "--slots", "99", *out)
    assert not (tmp_path / "out").exists()


def test_the_embedded_workload_can_be_swept_over(tmp_path, monkeypatch):
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a folder of that name in the way changes nothing
    train, test, _ = hold_out(["tiny"], 10, 20)
    assert len(train) > 1000 and len(test) == 20
    assert len(held_out_only("tiny", 5)) == 5
    with pytest.raises(MelinoeError, match="no such data"):
        hold_out(["nobody/nothing"], 0, None)
