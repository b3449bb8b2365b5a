"""A tokenizer that is not the model's: its ids are refused by name, wherever they come from."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import melinoe
from melinoe.cli.main import app
from melinoe.runtime.load import load_resident

SAID = "a token id is beyond the model's embeddings"


@pytest.fixture(scope="module")
def foreign(olmoe, tmp_path_factory):
    """A checkpoint of 64 embeddings whose tokenizer has 70 tokens."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    shutil.copytree(olmoe, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [f"new{number}" for number in range(70 - len(tokenizer))]
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(words[-1]) == 69
    return folder, words[-1]


def test_on_the_command_line(foreign, tmp_path, monkeypatch):
    folder, word = foreign
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    row = json.dumps({"prompt": "w1 w2", "completion": f"w3 {word}"}) + "\n"
    (tmp_path / "test.jsonl").write_text(row * 4)
    generate = ["generate", "--model", str(folder), "-p", f"w1 {word}", "--raw", "--slots", "2"]
    evaluate = ["evaluate", "--model", str(folder), "--data", str(tmp_path), "--quiet"]
    for arguments in (generate, evaluate):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 1
        assert f"{SAID}; got 69; allowed: 0 to 63; use the tokenizer" in done.stderr
        assert "unexpected" not in done.stderr


@pytest.mark.parametrize("wrong", [64, -1])
def test_in_a_direct_call(olmoe, olmoe_store, wrong):
    paged, (whole, _) = melinoe.load(olmoe_store, slots=3), load_resident(olmoe)
    for model in (paged, whole):
        with pytest.raises(melinoe.MelinoeError, match=rf"{SAID}; got {wrong}"):
            model(torch.tensor([[3, wrong, 4]]))
        with pytest.raises(melinoe.MelinoeError, match=rf"got {wrong}"):
            model.generate(torch.tensor([[3, wrong, 4]]), max_new_tokens=2)
        assert model(torch.tensor([[3, 63, 0]])).logits.shape == (1, 3, 64)
