"""Rows that people have: formats detected and named, read as what they are or refused with file and line."""

from __future__ import annotations

import csv
import gzip
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
    assert "1 row of messages" in described and "1 row of text" in described
    with pytest.raises(
        MelinoeError, match=r"line 1: unknown row format; got keys answer, query; allowed: messages"
    ):
        read_rows(write(tmp_path, {"query": "1+1?", "answer": "2"}))


def test_what_can_be_an_id_of_the_hub(tmp_path, monkeypatch):
    assert hub_data.is_id("openai/gsm8k") and hub_data.is_id("openai/gsm8k:main")
    for text in ("gsm8k", "data/train.jsonl", "data/train.csv.gz", "a/b/c", "/data/gsm8k", "../data"):
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
    found = list(hub_data.read("openai/gsm8k", "train", 2))
    assert [record for _, record in found] == [{"question": "1+1?", "answer": "2"}] * 2
    assert found[1][0] == "openai/gsm8k, row 2"
    assert len(list(hub_data.read("openai/gsm8k", "valid"))) == 3
    with pytest.raises(MelinoeError, match="no split test; allowed: train, validation"):
        list(hub_data.read("openai/gsm8k", "test"))


def test_folders_that_the_library_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    file = write(tmp_path, *[{"question": "1+1?", "answer": "2", "id": 7}] * 3)
    data = datasets.load_dataset("json", data_files=str(file), cache_dir=str(tmp_path / "cache"))["train"]
    datasets.DatasetDict({"train": data, "validation": data}).save_to_disk(str(tmp_path / "parts"))
    data.save_to_disk(str(tmp_path / "whole"))
    assert len(read_rows(tmp_path / "parts", "valid")) == len(read_rows(tmp_path / "whole", "test")) == 3
    assert read_rows(tmp_path / "parts")[0].unused == ("id",)
    with pytest.raises(MelinoeError, match="no split test; allowed: train, validation"):
        read_rows(tmp_path / "parts", "test")


def test_parquet_is_read_whole_and_in_shards(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    user, tool = {"role": "user", "content": "hi"}, {"role": "assistant", "content": None}
    tool["tool_calls"] = [{"function": {"name": "clock", "arguments": "{}"}}]
    table = pyarrow.Table.from_pylist([{"messages": [user, tool], "score": 1}])
    for shard in range(2):
        (tmp_path / "data").mkdir(exist_ok=True)
        write_table(table, tmp_path / "data" / f"train-0000{shard}-of-00002.parquet")
    rows = read_rows(tmp_path)
    assert len(rows) == 2 and rows[0].messages == (user,)  # without the None that the table has in it
    assert rows[0].answer["tool_calls"][0]["function"] == {"name": "clock", "arguments": {}}
    assert rows[1].where.endswith("train-00001-of-00002.parquet, row 1") and rows[0].unused == ("score",)
    whole = (tmp_path / "data" / "train-00000-of-00002.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    with pytest.raises(MelinoeError, match=r"cut\.parquet is damaged after row 0"):
        read_rows(tmp_path / "cut.parquet")


def test_parquet_without_the_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MelinoeError, match=r"parquet needs .*pip install 'melinoe-moe\[data\]'"):
        read_rows(tmp_path / "a.parquet")


PAIR = {"prompt": "1+1? é", "completion": "2"}
LINE = json.dumps(PAIR, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINE.encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + LINE.encode()),  # a byte order mark
        ("a.jsonl", ("\n\n" + LINE.replace("\n", "\r\n")).encode()),
        ("a.json", json.dumps([PAIR], indent=1).encode()),
        ("a.jsonl", json.dumps([PAIR]).encode()),
        ("a.jsonl.gz", gzip.compress(LINE.encode(), mtime=0)),
        ("a.json.gz", gzip.compress(json.dumps([PAIR]).encode(), mtime=0)),
        ("a.csv", "prompt,completion\n1+1? é,2\n".encode()),
        ("a.csv", '\ufeffcompletion,"prompt"\r\n2,"1+1? é"\r\n'.encode()),
        ("a.tsv", "prompt\tcompletion\n1+1? é\t2\n".encode()),
        ("a.csv.gz", gzip.compress("prompt,completion\n1+1? é,2\n".encode(), mtime=0)),
    ],
)
def test_files_of_every_kind_hold_the_same_row(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (row,) = read_rows(tmp_path / name)
    assert (row.prompt, row.completion, row.kind) == ("1+1? é", "2", "prompt + completion")
    assert name in row.where


def test_a_table_holds_texts_and_nothing_is_guessed(tmp_path):
    """What pandas would read as numbers and missing values."""
    cells = [
        ["id", "prompt", "completion"],
        ["1", "007", "NA"],
        ["2", "a\nb, c", "1.0"],
        ["3", 'say "x"', ""],
    ]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(cells)
    rows = read_rows(tmp_path / "a.csv")
    assert [[row.prompt, row.completion] for row in rows] == [line[1:] for line in cells[1:]]
    assert [row.where.rpartition(", ")[2] for row in rows] == ["line 2", "line 3", "line 5"]
    conversation = json.dumps([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}])
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["conversations", "system"], [conversation, ""]])
    (row,) = read_rows(tmp_path / "b.csv")
    assert row.messages == ({"role": "user", "content": "hi"},) and row.completion == "yo"


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        (
            "a.jsonl",
            (LINE + LINE).encode("latin-1"),
            r"a\.jsonl, line 1: not UTF-8; got byte 0xe9 .*iconv -f latin1",
        ),
        ("a.csv", "prompt,completion\na,b\né,c\n".encode("latin-1"), r"a\.csv, line 3: not UTF-8"),
        ("a.jsonl", LINE.encode("utf-16"), "utf-16 text; allowed: UTF-8; convert it: iconv -f utf-16"),
        ("a.jsonl", (LINE + "{").encode(), "line 2: not JSON"),
        ("a.json", b'[{"prompt": "a",\n "completion" "b"}]', "line 2: not JSON"),
        ("a.json", b'{\n "data": []}', "line 1: not JSON.*one array of objects"),
        ("a.json", b'[{"prompt": "a", "completion": "b"}, 3]', "row 2: not a JSON object"),
        ("a.jsonl", gzip.compress(LINE.encode(), mtime=0)[:-9], "damaged"),
        ("a.csv", b"prompt;completion\na;b\n", "line 1: there is only one column; got prompt;completion"),
        ("a.csv", b"prompt,prompt\na,b\n", "two columns have the same name"),
        ("a.csv", b"prompt,completion\na,b\nc\n", "line 3: the line has 1 cells; allowed: 2"),
        ("a.csv", b'prompt,completion\na,"b" c\n', "not a csv line"),
        ("a.csv", b"prompt,completion\n", "has no rows"),
        ("a.parquet", b"nothing", "not a parquet file"),
        ("a.jsonl", b"[" * 100_000, "nested too deep|not JSON"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path, name, content, error):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MelinoeError, match=error):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["valid.jsonl", "validation.jsonl", "dev.jsonl", "val.jsonl", "val.json.gz"])
def test_the_valid_split_has_other_names(tmp_path, name):
    content = LINE.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for split in ("valid", "validation", "dev"):
        assert len(read_rows(tmp_path, split)) == 1
    with pytest.raises(MelinoeError, match=rf"no train\.jsonl .*got {name}"):
        read_rows(tmp_path)


def test_two_files_for_one_split_are_not_chosen_between(tmp_path):
    for name in ("val.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text(LINE)
    with pytest.raises(
        MelinoeError, match=r"more than one file may be the split valid; got dev\.jsonl, val\.json"
    ):
        read_rows(tmp_path, "valid")


def test_a_split_of_a_single_file_that_cannot_be(tmp_path):
    file = write(tmp_path, PAIR)
    assert len(read_rows(file, "test")) == 1
    with pytest.raises(MelinoeError, match="is one file, which has no split nonsense"):
        read_rows(file, "nonsense")
    with pytest.raises(MelinoeError, match="the split has no name"):
        read_rows(file, " ")


# ------------------------------------------------------------------ columns


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("record", "before", "completion"),
    [
        (  # ShareGPT
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            [user("hi")],
            "yo",
        ),
        (
            {"conversations": [user("hi"), assistant("yo")], "system": "Be brief."},
            [{"role": "system", "content": "Be brief."}, user("hi")],
            "yo",
        ),
        ({"prompt": [user("hi")], "completion": [assistant("yo")]}, [user("hi")], "yo"),  # TRL
        ({"prompt": [user("hi")], "completion": "yo"}, [user("hi")], "yo"),
        (  # content in parts
            {
                "messages": [
                    user([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]),
                    assistant("yo"),
                ]
            },
            [user("hi")],
            "yo",
        ),
        (  # LLaMA-Factory
            {
                "instruction": "and 2+2?",
                "input": "",
                "output": "4",
                "system": "Add.",
                "history": [["1+1?", "2"]],
            },
            [{"role": "system", "content": "Add."}, user("1+1?"), assistant("2"), user("and 2+2?")],
            "4",
        ),
        (  # OpenOrca
            {"system_prompt": "Add.", "question": "1+1?", "response": "2"},
            [{"role": "system", "content": "Add."}, user("1+1?")],
            "2",
        ),
        ({"messages": [{"role": "developer", "content": "Add."}, user("1+1?"), assistant("2")]}, None, "2"),
    ],
)
def test_conversations_that_people_have(tmp_path, record, before, completion):
    (row,) = read_rows(write(tmp_path, record))
    assert row.messages == tuple(before or ({"role": "system", "content": "Add."}, user("1+1?")))
    assert row.completion == completion and row.unused == ()


def test_tool_calls_stay_tool_calls(tmp_path):
    call = {"id": "1", "function": {"name": "clock", "arguments": '{"zone": "utc"}'}}
    result = {"role": "tool", "content": "12:00", "tool_call_id": "1"}
    talk = [user("time?"), {"role": "assistant", "tool_calls": [call]}, result, assistant("noon")]
    share = [
        {"from": "human", "value": "time?"},
        {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "utc"}}'},
    ]
    tools = [{"type": "function", "function": {"name": "clock"}}]
    first, second, third = read_rows(
        write(
            tmp_path,
            {"messages": talk, "tools": json.dumps(tools)},
            {"messages": talk[:2], "tools": tools},
            {"conversations": share, "tools": tools},
        )
    )
    function = {"name": "clock", "arguments": {"zone": "utc"}}
    assert first.messages[1]["tool_calls"][0]["function"] == function
    assert first.messages[2] == result and first.completion == "noon" and first.tools == tuple(tools)
    for row in (second, third):
        assert row.completion == "" and row.answer["tool_calls"][0]["function"] == function


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"messages": [user("hi")]}, "the last message is not the assistant's; got user"),
        ({"messages": [user("hi"), {"role": "assistant"}]}, "lacks role or content"),
        ({"messages": [user("hi"), {"role": "assistant", "content": None}]}, "lacks role or content"),
        ({"messages": ["hi"]}, "a message is text"),
        ({"messages": [user([{"type": "image"}]), assistant("yo")]}, "a part of a message is of type image"),
        ({"messages": [user(3), assistant("yo")]}, "the content of a message is the number 3"),
        ({"messages": "hi"}, "messages is text, and no JSON"),
        ({"conversations": [{"from": "alien", "value": "hi"}]}, "a message is from 'alien'"),
        ({"question": "1+1?", "answer": 2}, "answer is not text; got the number 2"),
        ({"prompt": "a", "completion": {"b": 1}}, "completion is not text; got an object"),
        ({"prompt": "a", "completion": "b", "history": ["x"]}, "the history has an unknown form; got"),
        ({"prompt": "a", "completion": "b", "tools": "clock"}, "tools is text, and no JSON"),
        (
            {"messages": [{"role": "system", "content": "a"}, user("b"), assistant("c")], "system": "d"},
            "two system messages",
        ),
        (
            {
                "messages": [
                    user("a"),
                    {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
                ]
            },
            "a tool call has an unknown form; got",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "unknown row format; got keys chosen, prompt"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(tmp_path, record, error):
    with pytest.raises(MelinoeError, match=rf"rows\.jsonl, line 2: .*{error}"):
        read_rows(write(tmp_path, PAIR, record))


def test_columns_that_are_not_used_are_named_once(tmp_path):
    rows = read_rows(write(tmp_path, *[PAIR | {"id": n, "source": "x", "note": None} for n in range(3)]))
    assert describe_rows(rows) == "3 rows of prompt + completion; columns not used: id, source"
