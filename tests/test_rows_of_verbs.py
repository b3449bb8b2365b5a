"""What the verbs say of their rows: how many were left out and why, what was not used, which answers
counted."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from melinoe.cli.main import app
from text_model import rows, save

TURNS = [
    {"role": "user", "content": "1+1=?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "say ab"},
    {"role": "assistant", "content": "ab"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def data(tmp_path):
    """Ten rows that fit, two that are too long for the model (256 tokens), an empty one, and a
    conversation."""
    folder = tmp_path / "data"
    folder.mkdir()
    records = [{"prompt": row.prompt, "completion": row.completion, "source": "x"} for row in rows(10)]
    records += [{"prompt": "a" * 300, "completion": "b"}] * 2 + [{"prompt": "a", "completion": ""}]
    text = "".join(json.dumps(record) + "\n" for record in [*records, {"messages": TURNS}])
    for name in ("train", "dev", "test"):
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [*map(str, arguments), "--quiet"])
    assert result.exit_code == code, result.output
    return result


def test_rows_left_out_are_said_and_counted(model, data, tmp_path):
    said = "3 of 14 rows left out: 2 over 256 tokens, 1 with an empty answer"
    read = "13 rows of prompt + completion, 1 row of messages; columns not used: source"
    source = ("--model", model, "--data", data)
    commands = [
        ("evaluate", *source, "--metrics", "perplexity"),
        ("trace", *source, "--output", tmp_path / "a.trace"),
        ("tune", *source, "--output-dir", tmp_path / "tuned", "--max-steps", "2", "--rank", "2"),
    ]
    for command in commands:
        result = run(*command, "--json")
        answer = json.loads(result.stdout.strip().splitlines()[-1])
        assert (answer["num_rows_left_out"], answer["max_length"]) == (3, 256)
        assert answer["left_out"] == {"too_long": 2, "empty": 1}
        assert said in result.stderr and read in result.stderr
    shorter = json.loads(run(*commands[0], "--max-length", 12, "--json").stdout.strip().splitlines()[-1])
    assert shorter["max_length"] == 12 and shorter["num_rows_left_out"] > 3
    result = run(*commands[0])
    assert "num_rows_left_out 3" in " ".join(result.stdout.split()) and said in result.stderr
    for command in commands[:2]:
        error = run(*command, "--max-length", 2, code=1)
        assert "no row can be used: 14 of 14 rows left out" in error.stderr
        assert "raise --max-length" in error.stderr


def test_the_last_turn_alone(model, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": TURNS}) + "\n")
    tokens = []
    for more in ((), ("--last-turn-only",)):
        command = ("evaluate", "--model", model, "--data", file, "--metrics", "perplexity", "--json", *more)
        tokens.append(json.loads(run(*command).stdout.strip().splitlines()[-1])["num_tokens"])
        run("trace", "--model", model, "--data", file, "--output", tmp_path / "a.trace", *more)
        tune = ("--output-dir", tmp_path / f"tuned{len(more)}", "--max-steps", "1", "--rank", "2", *more)
        run("tune", "--model", model, "--data", file, *tune)
    assert tokens == [5, 3]  # `2<eos>` and `ab<eos>`


def test_a_row_that_cannot_be_rendered_is_named(model, tmp_path):
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "clock", "arguments": {}}}],
    }
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": [TURNS[0], call]}) + "\n")
    for verb, more in (
        ("evaluate", ()),
        ("trace", ("--output", tmp_path / "x")),
        ("tune", ("--output-dir", tmp_path / "y")),
    ):
        error = run(verb, "--model", model, "--data", file, *more, code=1).stderr
        assert "a.jsonl, line 1: the chat template does not write tool calls" in error, error
        assert len([line for line in error.splitlines() if line.startswith("melinoe:")]) == 1
