"""What was tuned here runs elsewhere: the merged checkpoint as GGUF gives llama.cpp the same tokens."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import melinoe
from families import save_checkpoint
from melinoe.benchmark.gguf_file import write_gguf

STEPS = {"max_steps": 20, "learning_rate": 2e-2, "router_learning_rate": 5e-2}


def test_a_tuned_checkpoint_gives_the_same_tokens_in_llama_cpp(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    from melinoe.benchmark.llama_cpp import LlamaCpp

    base = save_checkpoint(tmp_path / "base", "olmoe")
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3} w{i + 4}"} for i in range(12)]
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    melinoe.tune(base, data, tmp_path / "adapter", **STEPS)
    melinoe.merge(base, tmp_path / "adapter", tmp_path / "tuned")
    write_gguf(tmp_path / "tuned", tmp_path / "tuned.gguf", "f32")

    def answer(folder, prompt):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.tensor([prompt])
        whole = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        return whole[0, len(prompt) :].tolist()

    ends = AutoModelForCausalLM.from_pretrained(base).generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    engine = LlamaCpp(tmp_path / "tuned.gguf", 64, exact=True)
    try:
        prompts = [[3, 4], [9, 5, 20, 7], [11]]
        expected = [answer(tmp_path / "tuned", prompt) for prompt in prompts]
        assert [list(engine.generate(prompt, 12, ends).tokens) for prompt in prompts] == expected
        assert expected != [answer(base, prompt) for prompt in prompts]
    finally:
        engine.close()
