"""The command line as a user meets it: help, JSON, one line for every mistake, exit codes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from melinoe.cli.main import app
from melinoe.cli.order import EXAMPLES


def melinoe(*arguments, check=True, **settings):
    """Runs the real program."""
    result = subprocess.run(
        [sys.executable, "-m", "melinoe", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **settings,
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3} w{i + 4}"} for i in range(12)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_are_light(option):
    heavy = "('torch', 'transformers', 'numpy', 'peft', 'fastapi')"
    code = f"""
import sys, melinoe.cli.main
try:
    melinoe.cli.main.app(["{option}"])
finally:
    print([m for m in {heavy} if m in sys.modules])
"""
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said.splitlines()[-1] == "[]" and len(said.splitlines()) > 1


def test_help_lists_the_verbs_in_order_with_an_example_that_can_be_typed():
    verbs = typer.main.get_command(app)
    assert EXAMPLES.keys() == verbs.commands.keys()
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    places = [result.output.index(f"  {verb} ") for verb in EXAMPLES]
    assert places == sorted(places)
    for verb, example in EXAMPLES.items():
        assert f"{example}\n" in result.output
        program, name, *arguments = shlex.split(example)
        assert (program, name) == ("melinoe", verb)
        verbs.commands[name].make_context(name, arguments)  # raises what cannot be typed
        assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("typed", "completed"), [("melinoe ge", "generate"), ("melinoe plan --mem", "--memory")]
)
def test_the_shell_completes_verbs_and_options(typed, completed):
    """As bash asks for it, once `melinoe --install-completion` has told it how."""
    asked = {"_MELINOE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    code = "import sys; sys.argv = ['melinoe']; from melinoe.cli.main import main; main()"
    said = subprocess.check_output([sys.executable, "-c", code], text=True, env={**os.environ, **asked})
    assert said.split() == [completed]


def test_what_is_loaded_is_said_before_anything_is():
    code = """
import sys
class Refuse:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            sys.exit("torch is imported")
sys.meta_path.insert(0, Refuse)
from melinoe.cli.main import app
app(["generate", "--model", "tiny", "-p", "hi"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == ["melinoe: loading tiny", "torch is imported"]


def test_the_way_of_the_data(olmoe, data, tmp_path):
    """Every verb once, each on what the one before wrote."""
    quiet = {"cwd": tmp_path}
    tune = ["--max-steps", 3, "--output-dir", "adapter", "--quiet", "--json"]
    tuned = json.loads(
        melinoe("tune", "--model", olmoe, "--data", data, *tune, **quiet).stdout.splitlines()[-1]
    )
    assert tuned["steps"] == 3
    melinoe("merge", "--model", olmoe, "--adapter", "adapter", "--output-dir", "tuned", **quiet)
    melinoe(
        "trace", "--model", "tuned", "--data", data, "--output", "t.trace", "--limit", 10, "--quiet", **quiet
    )
    simulated = melinoe(
        "simulate", "t.trace", "--policy", "decay,lru,belady", "--slots", 4, "--json", **quiet
    )
    rows = json.loads(simulated.stdout.splitlines()[-1])["results"]
    assert [row["policy"] for row in rows] == ["decay", "lru", "belady"]
    assert all(
        0 <= row["hit_rate"] <= 1 and row["loads_per_token"] >= 0 and row["slots"] == 4 for row in rows
    )
    melinoe(
        "fit-predictor", "--model", "tuned", "--trace", "t.trace", "--output", "predictor", "--quiet", **quiet
    )
    melinoe("convert", "tuned", "store", "--quiet", **quiet)
    melinoe("verify", "store", **quiet)
    prompt = ["-p", "w3 w4", "--max-new-tokens", 6, "--slots", 4]
    said = json.loads(
        melinoe("generate", "--model", "store", "--predictor", "predictor", *prompt, "--json", **quiet).stdout
    )
    plain = melinoe("generate", "--model", "store", *prompt, **quiet)
    assert plain.stdout.strip() == said["text"].strip()
    for part in ("prompt", "generation", "TTFT", "hit rate", "per token", "peak memory"):
        assert part in plain.stderr
    scored = melinoe(
        "evaluate", "--model", "tuned", "--data", data, "--limit", 8, "--quiet", "--json", **quiet
    )
    result = json.loads(scored.stdout.splitlines()[-1])
    assert {"nll", "perplexity", "exact_match", "rouge_l"} <= result.keys()
    # an adapter on a store of its base is the same model as the merged one
    melinoe("convert", olmoe, "base-store", "--quiet", **quiet)
    with_adapter = melinoe("generate", "--model", "base-store", "--adapter", "adapter", *prompt, **quiet)
    assert with_adapter.stdout == plain.stdout


def one_line(result):
    """The message of a refusal: exit 1, nothing on stdout, one line on stderr."""
    assert result.returncode == 1, (result.returncode, result.stderr)
    assert result.stdout == ""
    known = ("melinoe: loading ", "slots per layer")  # what is opened, and the plan
    lines = [line for line in result.stderr.strip().splitlines() if not any(one in line for one in known)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("melinoe: ")
    return lines[0]


def test_mistakes_are_one_line(olmoe, olmoe_store, data, tmp_path):
    def refused(*arguments):
        return one_line(melinoe(*arguments, check=False, cwd=tmp_path))

    assert "no such model" in refused("generate", "--model", "nowhere", "-p", "hi")
    assert "prompt is empty" in refused("generate", "--model", olmoe_store, "-p", " ")
    assert "too small" in refused("generate", "--model", olmoe_store, "-p", "w1", "--memory", "10KiB")
    assert "not a memory size" in refused("generate", "--model", olmoe_store, "-p", "w1", "--memory", "8G")
    assert "unknown policy" in refused(
        "generate", "--model", olmoe_store, "-p", "w1", "--policy", "x", "--slots", "2"
    )
    assert "longer than the model's context" in refused(
        "generate", "--model", olmoe_store, "-p", "w1", "--slots", "2", "--max-new-tokens", "500"
    )
    assert "no such data" in refused("evaluate", "--model", olmoe, "--data", "nowhere")
    (data / "bad.jsonl").write_text('{"prompt": "w1", "completion": "w2"}\n{"prompt": \n')
    assert "bad.jsonl, line 2" in refused("evaluate", "--model", olmoe, "--data", data / "bad.jsonl")
    (data / "other.jsonl").write_text('{"question": "w1"}\n')
    assert "other.jsonl, line 1" in refused(
        "tune", "--model", olmoe, "--data", data / "other.jsonl", "--output-dir", "o"
    )
    (data / "empty.jsonl").write_text("\n")
    assert "no rows" in refused("trace", "--model", olmoe, "--data", data / "empty.jsonl", "--output", "t")
    assert "bad.jsonl" in refused("simulate", data / "bad.jsonl")
    assert "metric" in refused("evaluate", "--model", olmoe, "--data", data, "--metrics", "bleu")
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "t").exists()


def test_wrong_usage_exits_with_2():
    for arguments in (["nosuch"], ["generate", "--modle", "x"], ["tune"]):
        assert melinoe(*arguments, check=False).returncode == 2


def test_traceback_on_request(tmp_path):
    environment = {**os.environ, "MELINOE_TRACEBACK": "1"}
    result = melinoe("generate", "--model", "nowhere", "-p", "hi", check=False, cwd=tmp_path, env=environment)
    assert "Traceback" in result.stderr


def hear_ctrl_c():
    """A shell's background jobs ignore Ctrl-C, and so do their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_exits_with_130_and_says_what_is_kept(olmoe, data, tmp_path):
    command = [sys.executable, "-m", "melinoe", "tune", "--model", str(olmoe), "--data", str(data)]
    command += ["--output-dir", "adapter", "--max-steps", "100000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    )
    log = tmp_path / "adapter.melinoe-partial" / "losses.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    saved = (
        tmp_path / "adapter.melinoe-partial" / "checkpoint"
    ).exists()  # after 50 steps, if it came so far
    kept = "steps are kept in adapter.melinoe-partial" if saved else "nothing is kept to go on with"
    assert errors.splitlines()[-1].startswith("melinoe: stopped; ") and kept in errors.splitlines()[-1]
    assert log.exists()
    assert not (tmp_path / "adapter").exists()
