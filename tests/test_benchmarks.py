"""The scripts in benchmarks/: each can still be started, and what they share does what it says."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(file for file in BENCHMARKS.glob("*.py") if "__main__" in file.read_text())


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_benchmark_starts(script, monkeypatch, capsys):
    """Its imports are there, and its help is its docstring."""
    pytest.importorskip("peft")
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"python benchmarks/{script.name}" in text and "--output" in text


def test_contestants_take_turns():
    from common import turns

    assert list(turns(["a", "b"], 3)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def test_a_spread_by_hand():
    from common import spread, written

    values = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert spread(values) == {"n": 5, "median": 3, "q1": 2, "q3": 4, "lowest": 1, "highest": 5}
    assert written(values, 1) == "3.0 (1.0 to 5.0)"
    assert spread([7.0])["q1"] == 7 and written([7.0], 0) == "7"


def test_two_runs_that_contradict_each_other():
    from same_order import compared

    first = {"a": [9.0, 8.0, 9.0], "b": [5.0, 4.0, 5.0], "c": [3.0, 5.0, 4.0], "alone": [1.0, 1.0, 1.0]}
    second = {"a": [3.0, 2.0, 3.0], "b": [5.0, 4.0, 5.0], "c": [1.0, 1.0, 1.0]}
    assert compared(first, second) == {
        "alike": [("a", "c")],
        "in one": [("b", "c")],
        "contradictions": [("a", "b")],
    }


PROGRAM = """
import sys, time
from common import begin, memory_limit, parser_of, temporary_folder, write_result
options = begin(parser_of("A benchmark."))
if options.output:
    write_result(options, answer=42)
else:
    with temporary_folder("test") as folder, memory_limit(2**34) as limit:
        print(folder, limit.folder, flush=True)
        time.sleep(60)
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path)], os.environ | {
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])
    }


def test_what_a_stopped_benchmark_made_is_gone(program):
    command, environment = program
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        made = [Path(name) for name in process.stdout.readline().split()]
        assert made[0].is_dir()
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert not any(path.exists() for path in made)


def test_a_result_says_where_it_was_measured(program, tmp_path):
    command, environment = program
    subprocess.run([*command, "--output", str(tmp_path / "r.json")], env=environment, check=True)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["benchmark"] == "program" and result["answer"] == 42
    wanted = {"processor", "cores", "memory_bytes", "torch", "transformers", "melinoe", "commit", "date"}
    assert wanted <= result["conditions"].keys()


def test_what_a_user_can_cause_is_one_line(program, tmp_path):
    """Every script begins with `begin`, so what holds for one holds for all; others keep their trace."""
    command, environment = program
    script = tmp_path / "fails.py"
    for error in ("MelinoeError('no such model', got='x')", "KeyError('x')"):
        script.write_text(
            "from common import begin, parser_of\nfrom melinoe.errors import MelinoeError\n"
            f"begin(parser_of('A benchmark.'))\nraise {error}\n"
        )
        run = subprocess.run([command[0], str(script)], env=environment, capture_output=True, text=True)
        assert run.returncode == 1
        if "Melinoe" in error:
            assert run.stderr == "fails.py: no such model; got x\n"
        else:
            assert "Traceback" in run.stderr


def test_a_sentence_encoder_finds_prompts_that_are_alike(tmp_path):
    """The library's own classes around random weights: the same text is its own nearest, template or not."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    import chat_tokenizers
    from predictors import sentence_vectors

    words = chat_tokenizers.tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    inner = Transformer(str(tmp_path / "bert"))
    library.SentenceTransformer(modules=[inner, Pooling(32)], device="cpu").save(str(tmp_path / "encoder"))
    prompts = [words(text, add_special_tokens=False)["input_ids"] for text in ("What is 2+2?", "Hello")]
    found = sentence_vectors(str(tmp_path / "encoder"), words, [*prompts, prompts[0]])
    assert found.shape == (3, 32) and found[0].equal(found[2])
    assert (found[0] - found[1]).norm() > 1e-2
