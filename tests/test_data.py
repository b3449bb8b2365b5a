"""Text rows: formats detected and named, data sets of the Hub, what is missing said in one line."""

from __future__ import annotations

import json
import sys

import pytest

from melinoe.data import hub as hub_data
from melinoe.data.rows import describe_rows, read_rows
from melinoe.errors import MelinoeError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


def write(folder, *records):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_formats_are_detected_line_by_line(tmp_path):
    file = write(
        tmp_path,
        {"messages": [*MESSAGES, {"role": "assistant", "content": "2"}]},
        {"prompt": "1+1?", "completion": "2", "task": "sums"},
        {"question": "1+1?", "answer": "2"},
        {"instruction": "Add.", "context": "1 and 1", "response": "2"},
        {"instruction": "Add.", "context": "", "response": "2"},
        {"instruction": "Add.", "input": "1 and 1", "output": "2"},
        {"text": "one and one are two"},
    )
    rows = read_rows(file)
    assert rows[0].messages == tuple(MESSAGES) and rows[1].task == "sums"
    assert [row.completion for row in rows] == ["2"] * 6 + ["one and one are two"]
    prompts = ["1+1?", "1+1?", "Add.\n\n1 and 1", "Add.", "Add.\n\n1 and 1", ""]
    assert [row.prompt for row in rows[1:]] == prompts
    described = describe_rows(rows)
    assert described.startswith("2 rows of instruction + response")
    assert "1 rows of messages" in described and "1 rows of text" in described
    with pytest.raises(
        MelinoeError, match=r"line 1: unknown row format; got keys answer, query; allowed: messages"
    ):
        read_rows(write(tmp_path, {"query": "1+1?", "answer": "2"}))


def test_what_can_be_an_id_of_the_hub(tmp_path, monkeypatch):
    assert hub_data.is_id("openai/gsm8k") and hub_data.is_id("openai/gsm8k:main")
    for text in ("gsm8k", "data/train.jsonl", "a/b/c", "/data/gsm8k", "../data"):
        assert not hub_data.is_id(text), text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    with pytest.raises(MelinoeError, match=r"no train\.jsonl"):  # a folder that exists is a folder
        read_rows("openai/gsm8k")


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what import finds where it is not installed
    with pytest.raises(MelinoeError, match=r"pip install 'melinoe-moe\[data\]'"):
        read_rows("openai/gsm8k:main")


def test_a_data_set_is_read_by_split(tmp_path, monkeypatch):
    """With the library itself, which reads a local folder of the same name without a network."""
    pytest.importorskip("datasets")
    folder = tmp_path / "openai" / "gsm8k"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n' * 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert list(hub_data.read("openai/gsm8k", "train", 2)) == [{"question": "1+1?", "answer": "2"}] * 2
    assert len(list(hub_data.read("openai/gsm8k", "valid"))) == 3
    with pytest.raises(MelinoeError, match="no split test; got train, validation"):
        hub_data.read("openai/gsm8k", "test")
