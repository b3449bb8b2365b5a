"""A checkpoint written as GGUF: llama.cpp in float32 gives the tokens of transformers in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from families import save_tokenizer
from family_configs import config
from melinoe.benchmark.gguf_file import write_gguf
from melinoe.conversion.checkpoint import Checkpoint
from melinoe.errors import MelinoeError

gguf = pytest.importorskip("gguf")
FAMILIES = ("olmoe", "mixtral", "qwen3_moe")


def save(folder, family="olmoe", **changed):
    """A tiny random checkpoint; `changed` of its config."""
    torch.manual_seed(0)
    theirs = config(family)
    for name, value in {"sliding_window": None, "mlp_only_layers": [], **changed}.items():
        setattr(theirs, name, value)
    model = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder, family)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp(request.param) / "model", request.param)


def test_llama_cpp_gives_the_tokens_of_transformers(checkpoint, tmp_path):
    pytest.importorskip("xllamacpp")
    from melinoe.benchmark.llama_cpp import LlamaCpp

    write_gguf(checkpoint, tmp_path / "f32.gguf", "f32")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    rival = LlamaCpp(tmp_path / "f32.gguf", 64, exact=True)
    generator = np.random.default_rng(0)
    for length in (1, 5, 12):
        prompt = generator.integers(3, model.config.vocab_size, length).tolist()
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        answer = rival.generate(prompt, 12, ends)
        assert answer.tokens == whole[0, length:].tolist()
        assert answer.times == sorted(answer.times) and len(answer.times) == 12
    rival.close()


@pytest.mark.parametrize(("precision", "bits"), [("f32", 32), ("bf16", 16), ("q8_0", 8.5), ("q4_0", 4.5)])
def test_every_weight_is_where_llama_cpp_looks_for_it(precision, bits, tmp_path):
    """Each expert's rows, read back from the file, are the checkpoint's, rounded as the format does."""
    source = save(tmp_path / "model", "olmoe", hidden_size=64, intermediate_size=32)
    result = write_gguf(source, tmp_path / "a.gguf", precision)
    opened = Checkpoint(source)
    tensors = {one.name: one for one in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    values = 0
    for layer in opened.layers:
        for expert in range(layer.num_experts):
            own = opened.expert(layer, expert)
            gate, up = own["gate_up_proj"].float().chunk(2)
            parts = {"gate": gate, "up": up, "down": own["down_proj"].float()}
            for name, weight in parts.items():
                stored = tensors[f"blk.{layer.index}.ffn_{name}_exps.weight"]
                found = gguf.quants.dequantize(stored.data[expert], stored.tensor_type)
                tolerance = {"f32": 0, "bf16": 2**-8, "q8_0": 2**-7, "q4_0": 2**-3}[precision]
                error = np.abs(found - weight.numpy()).max()
                assert error <= tolerance * weight.abs().max() * 1.01, (name, expert)
                values += weight.numel()
    assert result["expert_bytes"] * 8 == values * bits


def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path):
    norm = save(tmp_path / "a", "olmoe", norm_topk_prob=True)
    with pytest.raises(MelinoeError, match="computes this family otherwise; got norm_topk_prob True"):
        write_gguf(norm, tmp_path / "a.gguf")
    with pytest.raises(MelinoeError, match="not written as GGUF; got phimoe"):
        write_gguf(save(tmp_path / "b", "phimoe"), tmp_path / "b.gguf")
    with pytest.raises(MelinoeError, match="unknown precision of a GGUF file; got q3"):
        write_gguf("tiny", tmp_path / "c.gguf", "q3")
    window = save(tmp_path / "e", "mixtral", sliding_window=16)
    with pytest.raises(MelinoeError, match="computes this family otherwise; got sliding_window 16"):
        write_gguf(window, tmp_path / "e.gguf")
    narrow = save(tmp_path / "d", "olmoe", intermediate_size=24)
    with pytest.raises(MelinoeError, match="cannot be written as q8_0; got rows of 24"):
        write_gguf(narrow, tmp_path / "d.gguf", "q8_0")
    assert not list(tmp_path.glob("*.gguf*"))
