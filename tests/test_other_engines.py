"""What was tuned here runs elsewhere: the merged checkpoint as GGUF gives llama.cpp the same tokens."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import melinoe
from families import save_checkpoint
from melinoe.adapters.peft_folder import Base, write_adapter
from melinoe.benchmark.gguf_file import write_gguf
from melinoe.experts.low_rank import attach_low_rank
from melinoe.models.layers import fingerprint, moe_layers
from melinoe.models.pretrained import load_model

STEPS = {"max_steps": 20, "learning_rate": 2e-2, "router_learning_rate": 5e-2}


@pytest.mark.parametrize("family", ["olmoe", "gemma4_text", "glm4_moe"])
def test_a_merged_checkpoint_has_the_dtypes_of_its_base(family, tmp_path):
    """Buffers too, which are float32 while the sum is made."""
    base = save_checkpoint(tmp_path / "base", family, dtype=torch.bfloat16)
    tuned = load_model(base, dtype="auto").float()
    for layer in moe_layers(tuned):
        attach_low_rank(layer.experts, 2, 4.0)
    write_adapter(tuned, tmp_path / "adapter", Base(str(base), fingerprint(load_model(base, dtype="auto"))))
    melinoe.merge(base, tmp_path / "adapter", tmp_path / "merged")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    loaded = load_model(base, dtype="auto").state_dict()
    expected = {name: loaded.get(name, value).dtype for name, value in old.items()}
    assert {name: value.dtype for name, value in new.items()} == expected


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
