"""What cannot be offloaded is refused by its name, in one line, by every verb and before any work."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import melinoe
from families import save_tokenizer
from family_configs import config, refused_types
from melinoe.errors import MelinoeError
from melinoe.models.layers import moe_layers
from melinoe.models.supported import REFUSED, refusal


def folder_of(path, **fields):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    return path


def line_of(error):
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_every_type_that_is_not_exact(tmp_path):
    for name in refused_types():
        source = folder_of(tmp_path / "model", model_type=name)
        with pytest.raises(MelinoeError) as error:
            melinoe.convert(source, tmp_path / "store", progress=False)
        assert line_of(error).startswith(f"{name} models cannot be offloaded: "), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_reasons():
    assert "AutoModelForImageTextToText" in refusal("qwen3_vl_moe").what
    assert "pictures or sounds" in refusal("ernie4_5_vl_moe").what
    assert "encoder-decoder" in refusal("nllb-moe").what
    assert "encoder-decoder" in refusal("t5").what
    assert "a part of other models" in refusal("step3p5").what
    assert refusal("qwen3_moe") is None
    assert refusal("llama") is None  # dense: found when its layers are looked for


VERBS = {
    "convert": lambda model, data, out: melinoe.convert(model, out, progress=False),
    "load": lambda model, data, out: melinoe.load(model, slots=2),
    "plan": lambda model, data, out: melinoe.plan(model, "1GiB"),
    "trace": lambda model, data, out: melinoe.trace(model, data, out, progress=False),
    "tune": lambda model, data, out: melinoe.tune(model, data, out, progress=False, max_steps=1),
    "evaluate": lambda model, data, out: melinoe.evaluate(model, data),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3_vl_moe", "qwen3_vl_moe models cannot be offloaded: "),
        (
            "of_tomorrow",
            "transformers does not know this type of model; got of_tomorrow with transformers 5.",
        ),
    ],
)
def test_every_verb_says_so(verb, name, expected, tmp_path):
    source = folder_of(tmp_path / "model", model_type=name)
    save_tokenizer(source)
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"prompt": "w1 w2", "completion": "w3"}) + "\n")
    with pytest.raises(MelinoeError) as error:
        VERBS[verb](source, data, tmp_path / "out")
    assert line_of(error).startswith(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "test.jsonl"]


@pytest.mark.parametrize("name", REFUSED)
def test_mixtures_without_an_experts_interface(name):
    """They are real mixtures, and their model says so too when it was opened otherwise."""
    fields = {"is_moe": True} if name == "doge" else {}
    theirs = config(name)
    theirs.update(fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    with pytest.raises(MelinoeError) as error:
        moe_layers(model)
    assert line_of(error).startswith(f"{name} models cannot be offloaded: {REFUSED[name]}")


@pytest.mark.parametrize("name", ["llama", "doge", "gemma4_text"])
def test_dense_models(name, tmp_path):
    """doge and gemma4 may mix experts, and need not."""
    theirs = config(name)
    theirs.update({"doge": {"is_moe": False}, "gemma4_text": {"enable_moe_block": False}}.get(name, {}))
    theirs.save_pretrained(tmp_path / "model")
    with pytest.raises(MelinoeError) as error:
        melinoe.convert(tmp_path / "model", tmp_path / "store", progress=False)
    assert line_of(error).startswith(f"not a mixture-of-experts model: this {name} has no experts")
