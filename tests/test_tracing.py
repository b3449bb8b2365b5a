"""Traces of a model: the batched reading equals feeding one token after another."""

import json

import numpy as np
import pytest
import torch

from melinoe.data.rows import Row, encode
from melinoe.errors import MelinoeError
from melinoe.measure.trace import trace
from melinoe.models.layers import fingerprint, moe_layers
from melinoe.models.router_tap import RouterTap
from melinoe.routing.trace import Trace
from text_model import model_and_tokenizer, rows, save


def test_trace_equals_decoding_token_by_token():
    model, tokenizer = model_and_tokenizer()
    data = rows(6)
    result = trace((model, tokenizer), data, batch_size=4, progress=False)
    layers, start = moe_layers(model), 0
    for number, row in enumerate(data):
        encoded = encode(tokenizer, row)
        cache, seen = None, []
        fed = [
            encoded.ids[: encoded.prompt_length],
            *[[token] for token in encoded.ids[encoded.prompt_length : -1]],
        ]
        for tokens in fed:
            with torch.no_grad(), RouterTap(layers) as tap:
                output = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            seen.append(tap.indices().permute(1, 0, 2))
        expected = torch.cat(seen).numpy()  # [n - 1, L, K]
        length = len(encoded.ids) - 1
        of_row = slice(start, start + length)
        assert np.array_equal(np.sort(result.indices[of_row]), np.sort(expected))
        assert result.token_ids[of_row].tolist() == encoded.ids[:-1]
        assert set(result.sequence[of_row].tolist()) == {number}
        assert result.prompt_lengths[number] == encoded.prompt_length
        start += length
    assert start == len(result.indices)
    assert result.num_calls == sum(
        len(encode(tokenizer, row).ids) - encode(tokenizer, row).prompt_length for row in data
    )
    assert (result.num_experts, result.fingerprint) == (8, fingerprint(model))


def test_from_files_to_a_file(tmp_path):
    folder = save(tmp_path / "model")
    data = tmp_path / "test.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": row.prompt, "completion": row.completion}) + "\n" for row in rows())
    )
    result = trace(folder, data, tmp_path / "a.trace", limit=5, progress=False)
    again = Trace.load(tmp_path / "a.trace")
    assert again.num_sequences == 5
    assert again.settings["limit"] == 5
    assert np.array_equal(again.indices, result.indices)
    assert again.fingerprint == fingerprint(model_and_tokenizer()[0])


def test_long_rows_are_left_out_and_counted():
    data = [*rows(4), Row(({"role": "user", "content": "a" * 100},), "b")]
    result = trace(model_and_tokenizer(), data, max_length=40, progress=False)
    assert result.num_sequences == 4
    assert result.settings["num_rows_left_out"] == 1


def test_mistakes_are_named(tmp_path):
    model, _ = model_and_tokenizer()
    with pytest.raises(MelinoeError, match="comes with its tokenizer"):
        trace(model, rows(), progress=False)
    with pytest.raises(MelinoeError, match="an adapter needs a model path"):
        trace(model_and_tokenizer(), rows(), adapter=tmp_path, progress=False)
    with pytest.raises(MelinoeError, match="no such data"):
        trace(model_and_tokenizer(), tmp_path / "missing.jsonl", progress=False)
