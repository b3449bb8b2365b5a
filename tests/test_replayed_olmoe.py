"""benchmarks/replayed_olmoe.py: a checkpoint that goes through a recorded trace by its weights alone."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import melinoe
from melinoe.routing.trace import from_sequences
from melinoe.runtime.load import load_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = {"HIDDEN": 64, "INTERMEDIATE": 16, "EXPERTS": 8, "TOP_K": 2, "HEADS": 4, "VOCABULARY": 320}
PROMPT, NEW = 6, 8


def trace_of(seed: int):
    """Three sequences of four layers, the first too short to be taken; the layers 0 and 3 are."""
    random = np.random.default_rng(seed)
    lengths = [9, 20, 24]
    asked = [
        np.stack([[random.permutation(8)[:2] for _ in range(4)] for _ in range(tokens)]) for tokens in lengths
    ]
    return from_sequences(asked, [list(range(tokens)) for tokens in lengths], [5, 8, 10], 8)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """(folder, {name: trace}) after the program has run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    modules = [importlib.import_module(name) for name in ("random_olmoe", "replayed_olmoe")]
    for module in modules:
        for name, value in SMALL.items():
            monkeypatch.setattr(module, name, value, raising=False)
    traces = {name: trace_of(seed) for seed, name in enumerate(("base", "tuned"))}
    arguments = ["replayed_olmoe.py", "--folder", str(tmp_path), "--layers", "2", "--prompts", "2"]
    arguments += ["--prompt-tokens", str(PROMPT), "--new-tokens", str(NEW)]
    for name, trace in traces.items():
        trace.save(tmp_path / f"{name}.trace")
        arguments += ["--trace", f"{name}={tmp_path / f'{name}.trace'}"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(modules[1], "FIRST_ID", 190)  # w2 is the beginning of words
    modules[1].main()
    return tmp_path, traces


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_a_greedy_answer_walks_through_the_trace(written, name):
    folder, traces = written
    rows = [json.loads(line) for line in (folder / "rows" / "test.jsonl").read_text().splitlines()]
    found = melinoe.trace(folder / name, folder / "rows", split="test", progress=False)
    model, tokenizer = melinoe.load(folder / name, slots=2), load_tokenizer(folder / name)
    for number, (sequence, row) in enumerate(zip((1, 2), rows, strict=True)):
        text = row["prompt"]
        assert tokenizer(text).input_ids == [int(word[1:]) for word in text.split()]
        words = (row["prompt"] + row["completion"]).split()
        ids = [int(word[1:]) for word in words]
        prompt = torch.tensor([ids[:PROMPT]])
        answer = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
        assert answer[0].tolist() == ids
        begin = int(traces[name].prompt_lengths[sequence]) - PROMPT
        wanted = traces[name].indices[traces[name].sequence == sequence][:, [0, 3]]
        own = found.indices[found.sequence == number]
        assert np.array_equal(np.sort(own), np.sort(wanted[begin : begin + len(own)]))


def test_folders_share_what_is_large(written):
    folder, _ = written
    names = sorted(path.name for path in (folder / "shared").glob("*.safetensors"))
    assert len(names) == 3
    for name in names:
        assert (folder / "base" / name).samefile(folder / "tuned" / name)
