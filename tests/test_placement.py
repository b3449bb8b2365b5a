"""A fixed set of experts from a trace: counted by hand, and as KTransformers reads it."""

import json

import numpy as np
import pytest
import torch

import melinoe
from melinoe.cli.main import app
from melinoe.errors import MelinoeError
from melinoe.models.layers import fingerprint
from melinoe.prediction.placement import placement
from melinoe.routing.trace import from_sequences
from text_model import model_and_tokenizer, save


def by_hand(**identity):
    """Two layers, four experts, top-1. Decoding asks layer 0 for 2 2 1 and layer 1 for 3 0 3."""
    rows = np.array([[0, 0], [2, 3], [2, 0], [1, 3], [0, 0]])[..., None]
    return from_sequences([rows], [[1, 2, 3, 4, 5]], [1], 4, **identity)


def test_the_most_asked_first(tmp_path):
    found = placement(by_hand(model="m", fingerprint="f"), tmp_path / "p.json", slots=2)
    assert [layer["experts"] for layer in found["layers"]] == [[2, 1], [3, 0]]
    assert [layer["served"] for layer in found["layers"]] == [1.0, 1.0] and found["served"] == 1.0
    assert json.loads((tmp_path / "p.json").read_text()) == found
    assert placement(by_hand(), slots=1)["served"] == pytest.approx(4 / 6)
    assert melinoe.placement(by_hand(), slots=1)["layers"][0]["experts"] == [2]


def test_what_ktransformers_reads(tmp_path):
    """As kt_ep_wrapper.py does: "logical_count" of [passes, hidden layers, experts], passes added up."""
    model, _ = model_and_tokenizer()
    made = by_hand(fingerprint=fingerprint(model))
    made = type(made)(**{**vars(made), "num_experts": 8})
    placement(made, tmp_path / "p.pt", format="ktransformers", model=model)
    loaded = torch.load(tmp_path / "p.pt", map_location="cpu", weights_only=True)
    counts = loaded["logical_count"]
    assert counts.dim() == 3 and tuple(counts.shape[1:]) == (model.config.num_hidden_layers, 8)
    assert counts.sum(0).tolist()[:2] == [[0, 1, 2, 0, 0, 0, 0, 0], [1, 0, 0, 2, 0, 0, 0, 0]]
    placement(made, tmp_path / "p.pt", format="ktransformers", model=model)  # its own file is replaced


def test_dense_layers_have_a_row_of_their_own():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    from melinoe.prediction.placement import _by_hidden_layer

    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "vocab_size": 32}
    sizes |= {"shared_expert_intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 1, "mlp_only_layers": [0, 2]}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes))
    made = by_hand(fingerprint=fingerprint(model))
    table = _by_hidden_layer(made.request_counts("decode").sum(0), made, model)
    assert table.tolist() == [[0, 0, 0, 0], [0, 1, 2, 0], [0, 0, 0, 0], [1, 0, 0, 2]]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(MelinoeError, match="unknown format"):
        placement(by_hand(), format="gguf")
    with pytest.raises(MelinoeError, match="needs the model and a file"):
        placement(by_hand(), tmp_path / "p.pt", format="ktransformers")
    with pytest.raises(MelinoeError, match="no decoded tokens"):
        placement(from_sequences([np.zeros((2, 1, 1))], [[1, 2]], [1], 4))
    model, _ = model_and_tokenizer()
    with pytest.raises(MelinoeError, match="other routers"):
        placement(by_hand(), tmp_path / "p.pt", format="ktransformers", model=model)
    for name, format in (("notes.json", "json"), ("notes.pt", "ktransformers")):
        (tmp_path / name).write_text('{"mine": 1}')
        with pytest.raises(MelinoeError, match="exists already and is not replaced"):
            placement(by_hand(), tmp_path / name, format=format, model="somewhere")
        assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_the_verb(tmp_path, capsys):
    folder = save(tmp_path / "model")
    made = by_hand(fingerprint=fingerprint(model_and_tokenizer()[0]))
    made = type(made)(**{**vars(made), "num_experts": 8})
    made.save(tmp_path / "t")
    arguments = ["placement", tmp_path / "t", "--output", tmp_path / "p.pt", "--slots", 2]
    arguments += ["--format", "ktransformers", "--model", folder]
    app([*map(str, arguments)], standalone_mode=False)
    assert "2 of 8 experts in each of 2 layers, which serve 100.0%" in capsys.readouterr().out
