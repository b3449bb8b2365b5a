"""The embedded workload, tokenizer and model.

Every task's answer is worked out again here from the prompt alone, with none of the generator's code.
"""

from __future__ import annotations

import json
import re
import string
import subprocess
import sys
from datetime import date, timedelta
from decimal import ROUND_DOWN, Decimal

import pytest

from melinoe.tiny import data_path, model_path
from melinoe.tiny.workload import SPLITS, STEPWISE, TASKS, answer, rows, split_of, stream

PER_TASK = 150
WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
MONTHS = "january february march april may june july august september october november december".split()
RADIO = (
    "alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar "
    "papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
).split()
SIZES = {"feet": 12, "pounds": 16, "weeks": 7, "hours": 60, "gallons": 8, "yards": 4}


def numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


def to_roman(number: int) -> str:
    written = ""
    for value, numeral in zip(
        (100, 90, 50, 40, 10, 9, 5, 4, 1), ("C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"), strict=True
    ):
        while number >= value:
            written, number = written + numeral, number - value
    return written


def solve_units(prompt: str) -> str:
    _, a, large, c, small, _, b, _, d, _ = prompt.split()
    size = SIZES[large]
    over, rest = divmod((int(a) + int(b)) * size + int(c) + int(d), size)
    return f"{over} {large} {rest} {small}"


def solve_date(prompt: str) -> str:
    weekday, day, month, later = re.fullmatch(r"(\w+) (\d+) (\w+), (\d+) days later", prompt).groups()
    start = date(2023, MONTHS.index(month) + 1, int(day))  # 2023: a year whose february has 28 days
    end = start + timedelta(days=int(later))
    return f"{WEEKDAYS[(WEEKDAYS.index(weekday) + int(later)) % 7]} {end.day} {MONTHS[end.month - 1]}"


def solve_extract(prompt: str) -> str:
    patterns = (
        r"(?P<name>\w+) is a (?P<job>\w+) of (?P<age>\d+) who lives in (?P<city>\w+)",
        r"in (?P<city>\w+) lives (?P<name>\w+), aged (?P<age>\d+), who works as a (?P<job>\w+)",
        r"the (?P<job>\w+) (?P<name>\w+) from (?P<city>\w+) is (?P<age>\d+) years old",
        r"at (?P<age>\d+) our (?P<job>\w+) in (?P<city>\w+) goes by (?P<name>\w+)",
    )
    found = next(m for m in (re.fullmatch(f"extract: {p}", prompt) for p in patterns) if m).groupdict()
    record = {"name": found["name"], "age": int(found["age"]), "job": found["job"], "city": found["city"]}
    return json.dumps(record, separators=(",", ":"))


def solve_lookup(prompt: str) -> str:
    record, _, asked = prompt.partition("; find ")
    values = dict(re.findall(r"([a-z]+)(\d+)", record))
    return ",".join(values[key] for key in asked.split())


def solve_select(prompt: str) -> str:
    table, _, question = prompt.rpartition("; ")
    chosen = [
        n for n, age in (entry.split() for entry in table.split("; ")) if int(age) > numbers(question)[0]
    ]
    return " ".join(chosen) or "nobody"


def solve_edit(prompt: str) -> str:
    text, _, edits = prompt.removeprefix("edit ").partition(": ")
    for step in edits.split(", "):
        match step.split():
            case ["reverse"]:
                text = text[::-1]
            case ["drop", "first"]:
                text = text[1:]
            case ["drop", "last"]:
                text = text[:-1]
            case ["swap", "ends"]:
                text = text[-1] + text[1:-1] + text[0]
            case ["replace", old, "by", new]:
                text = text.replace(old, new)
            case ["append", new]:
                text += new
            case _:
                raise AssertionError(step)
    return text


def solve_logic(prompt: str) -> str:
    given, _, formula = prompt.partition(": ")
    values = {name: word == "true" for name, word in (pair.split("=") for pair in given.split())}
    return str(bool(eval(formula, {"__builtins__": {}}, values))).lower()


def solve_base(prompt: str) -> str:
    if prompt.startswith("hex"):
        bits = f"{int(prompt.split()[1], 16):016b}"
        return " ".join(bits[place : place + 4] for place in range(0, 16, 4))
    bits = prompt.removeprefix("binary ").removesuffix(" to hex").replace(" ", "")
    return f"{int(bits, 2):04X}"


def solve_cipher(prompt: str) -> str:
    _, text, _, shift = prompt.split()
    letters = string.ascii_uppercase
    return text.translate(str.maketrans(letters, letters[int(shift) :] + letters[: int(shift)]))


def solve_roots(prompt: str) -> str:
    found = [Decimal(number).sqrt().quantize(Decimal("0.0001"), ROUND_DOWN) for number in numbers(prompt)]
    return ",".join(map(str, found))


SOLVERS = {
    "add": lambda p: str(sum(numbers(p))),
    "subtract": lambda p: str(numbers(p)[1] - numbers(p)[0]),
    "multiply": lambda p: str(numbers(p)[0] * numbers(p)[1]),
    "divide": lambda p: "{} rest {}".format(*divmod(*numbers(p))),
    "sort": lambda p: ",".join(map(str, sorted(numbers(p)))),
    "compare": lambda p: str(max(numbers(p))),
    "units": solve_units,
    "roman": lambda p: " and ".join(map(to_roman, numbers(p))),
    "base": solve_base,
    "bill": lambda p: str(sum(a * b for a, b in zip(numbers(p)[::2], numbers(p)[1::2], strict=True))),
    "order": lambda p: " ".join(sorted(p.split()[1:])),
    "date": solve_date,
    "extract": solve_extract,
    "lookup": solve_lookup,
    "select": solve_select,
    "edit": solve_edit,
    "logic": solve_logic,
    "count": lambda p: str(p.split()[3:].count(p.split()[1])),
    "cipher": solve_cipher,
    "spell": lambda p: " ".join(RADIO[ord(letter) - ord("A")] for letter in p.split()[1]),
    "products": lambda p: ",".join(
        f"{a * b:06d}" for a, b in zip(numbers(p)[::2], numbers(p)[1::2], strict=True)
    ),
    "quotients": lambda p: ",".join(
        str(Decimal(a) / b)[2:10].ljust(8, "0")
        for a, b in zip(numbers(p)[::2], numbers(p)[1::2], strict=True)
    ),
    "roots": solve_roots,
    "remainders": lambda p: ",".join(f"{number % numbers(p)[0]:02d}" for number in numbers(p)[1:]),
}


@pytest.fixture(scope="module")
def train_rows() -> list[dict[str, str]]:
    return rows("train", PER_TASK * len(TASKS))


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task: str) -> None:
    for row in rows("train", PER_TASK, seed=5, tasks=[task]):
        assert answer(row["completion"]) == SOLVERS[task](row["prompt"]), row


def test_rows_are_deterministic_and_a_longer_call_only_adds(train_rows: list[dict[str, str]]) -> None:
    again = rows("train", 60)
    assert again == train_rows[:60]
    assert rows("train", 60, seed=1) != again
    assert [row["task"] for row in again[: len(TASKS)]] == list(TASKS)


def test_splits_never_share_a_prompt() -> None:
    prompts = {
        split: {row["prompt"] for row in rows(split, 3000, seed=seed)} for seed, split in enumerate(SPLITS)
    }
    assert all(len(found) == 3000 for found in prompts.values())
    assert all(split_of(prompt) == split for split, found in prompts.items() for prompt in found)
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["valid"]
    assert not prompts["valid"] & prompts["test"]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        next(stream("dev"))
    with pytest.raises(ValueError, match=r"unknown tasks \['chess'\]"):
        next(stream("train", tasks=["add", "chess"]))


def test_answer_is_the_last_line() -> None:
    assert answer("1+1=2\nanswer: 2") == "2"
    assert answer("answer: 1\nanswer: 4 rest 1\n") == "4 rest 1"
    assert answer("no end in sight") == ""


def test_data_path_writes_once_into_the_given_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("melinoe.tiny.TRAIN_ROWS", 40)
    monkeypatch.setattr("melinoe.tiny.VALID_ROWS", 20)
    monkeypatch.setattr("melinoe.tiny.TEST_ROWS", 20)
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    folder = data_path()
    assert folder.parent == tmp_path / "home"
    assert [path.name for path in (tmp_path / "home").iterdir()] == [folder.name]
    lines = (folder / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows("train", 40)
    written = (folder / "train.jsonl").stat().st_mtime_ns
    assert data_path() == folder
    assert (folder / "train.jsonl").stat().st_mtime_ns == written
    assert data_path(tmp_path / "other").parent == tmp_path / "other"


def test_the_package_imports_without_torch() -> None:
    code = "import sys, melinoe.tiny, melinoe.tiny.workload; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path())


def test_tokenizer_is_lossless_and_splits_digits_and_capitals(tokenizer, train_rows) -> None:
    for text in (string.printable, 'naïve: {"a":1}\n\t 42', *(row["completion"] for row in train_rows[:200])):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    pieces = tokenizer.tokenize("add 4096 and XIV 0.25")
    assert [piece for piece in pieces if re.search(r"[0-9A-Z]", piece)] == [*"4096", *"XIV", *"025"]
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<sep>", "<eos>"]) == [0, 1, 2]
    assert len(tokenizer) <= 1024


def test_built_tokenizer_is_the_embedded_one(tokenizer) -> None:
    from tiny_training.tokenizer import build_tokenizer

    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_chat_template_and_lengths(tokenizer, train_rows) -> None:
    row = train_rows[0]
    chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == f"{row['prompt']}<sep>{row['completion']}<eos>"
    prompts = tokenizer([row["prompt"] for row in train_rows])["input_ids"]
    completions = tokenizer([row["completion"] for row in train_rows])["input_ids"]
    assert max(len(p) + len(c) + 2 for p, c in zip(prompts, completions, strict=True)) <= 128
    by_task: dict[str, list[int]] = {}
    for row, ids in zip(train_rows, completions, strict=True):
        by_task.setdefault(row["task"], []).append(len(ids))
    assert all(15 <= sum(found) / len(found) <= 150 for found in by_task.values()), by_task


def test_packing_keeps_every_row_once_and_apart(tokenizer, train_rows) -> None:
    import torch

    from tiny_training.batches import batches, encode, pack

    lengths = [len(ids) for ids, _ in encode(tokenizer, train_rows[:300])]
    groups = pack(lengths, 128)
    assert sorted(index for group in groups for index in group) == list(range(300))
    assert max(sum(lengths[index] for index in group) for group in groups) <= 128
    assert sum(lengths) / (128 * len(groups)) > 0.85
    _, batch = next(batches(tokenizer, seed=0, lines=4, size=128))
    first = int((batch.positions[0, 1:] == 0).nonzero()[0]) + 1  # where the second example starts
    assert not batch.mask[0, 0, first:, :first].any()
    assert torch.equal(batch.mask[0, 0, :first, :first], torch.ones(first, first, dtype=torch.bool).tril())
    here = batch.labels[0, : first - 1] != -100
    assert torch.equal(batch.labels[0, : first - 1][here], batch.ids[0, 1:first][here])


def test_training_experts_agree_with_the_stock_ones() -> None:
    import torch
    from transformers import OlmoeForCausalLM

    from tiny_training.experts import register
    from tiny_training.train import make_config

    results = []
    ids = torch.arange(3, 51).reshape(2, 24)
    for implementation in ("eager", register()):
        torch.manual_seed(0)
        config = make_config(64)
        config.num_hidden_layers = 2
        config._experts_implementation = implementation
        model = OlmoeForCausalLM(config)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for stock, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)


def test_embedded_model_loads_plainly_and_does_its_tasks(tokenizer) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tiny_training.evaluate import forced_match, generated_match

    files = [path for path in model_path().iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16_000_000
    model = AutoModelForCausalLM.from_pretrained(model_path())
    assert model.config.model_type == "olmoe"
    assert model.dtype == torch.bfloat16
    scores = forced_match(model, tokenizer, rows("test", 3 * len(TASKS), seed=9))
    stepwise = [scores[task] for task in STEPWISE]
    assert sum(score["loss"] for score in stepwise) / len(STEPWISE) < 0.1
    assert sum(score["completion"] for score in stepwise) / len(STEPWISE) > 0.6
    # mental arithmetic keeps the workload's likelihood away from zero (docs/decisions/0005)
    assert 0.02 < scores["overall"]["loss"] < 0.6
    easy = rows("test", 6, seed=9, tasks=["lookup", "spell", "extract"])
    assert generated_match(model, tokenizer, easy)["overall"]["answer"] > 0.6
