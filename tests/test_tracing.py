"""Traces of a model: the batched reading equals feeding one token after another."""

import json
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from safetensors import safe_open

from melinoe.data.encoding import encode
from melinoe.data.rows import Row
from melinoe.errors import MelinoeError
from melinoe.measure import trace as module
from melinoe.measure.trace import trace
from melinoe.models.layers import fingerprint, moe_layers
from melinoe.models.router_tap import RouterTap
from melinoe.routing.calls import PREFILL
from melinoe.routing.trace import Trace, from_sequences
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


def test_a_trace_does_not_hold_on_to_what_the_layers_were_fed():
    """Of 4,096 tokens through 48 layers of width 4,096 that would be 1.6 GB."""
    model, _ = model_and_tokenizer()
    layers, fed = moe_layers(model), []
    hook = layers[0].router.register_forward_pre_hook(lambda _, args: fed.append(weakref.ref(args[0])))
    ids, found = torch.tensor([[5, 6, 7], [8, 9, 3]]), []
    for choices_only in (False, True):
        with torch.no_grad(), RouterTap(layers, choices_only=choices_only) as tap:
            model(input_ids=ids, use_cache=False)
        found.append(tap.by_sequence(ids.shape, [3, 3]))
        assert (fed[-1]() is None) == choices_only
    hook.remove()
    assert np.array_equal(*found)


def test_a_conversation_is_traced_as_its_turns_would_go():
    """What stands between two answers is another prompt, read in one call behind the last token of the
    first."""
    model, tokenizer = model_and_tokenizer()
    turns = ({"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "23"})
    row = Row((*turns, {"role": "user", "content": "say ab"}), "abc")
    encoded = encode(tokenizer, row)
    (first, behind), (second, end) = encoded.answers
    result = trace((model, tokenizer), [row], progress=False)
    ids, layers, cache, seen, sizes = encoded.ids, moe_layers(model), None, [], []
    calls = [ids[:first], *([token] for token in ids[first : behind - 1])]
    calls += [ids[behind - 1 : second], *([token] for token in ids[second : end - 1])]
    for tokens in calls:
        with torch.no_grad(), RouterTap(layers) as tap:
            cache = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).past_key_values
        seen.append(tap.indices().permute(1, 0, 2))
        sizes.append(len(tokens))
    assert np.array_equal(np.sort(result.indices), np.sort(torch.cat(seen).numpy()))
    assert np.diff(result.call_offsets).tolist() == sizes
    assert result.call_phase.tolist() == [int(size == 1) for size in sizes]
    assert result.prompts() == [ids[:first]] and result.prompt_lengths.tolist() == [first]
    assert result.request_counts(PREFILL).sum() == first * len(layers) * 2
    assert int(result.decoded.sum()) == (behind - first - 1) + (end - second - 1)
    alone = trace((model, tokenizer), [row], last_turn_only=True, progress=False)
    assert alone.prompts() == [ids[:second]] and int(alone.decoded.sum()) == end - second - 1


def test_calls_of_a_conversation_by_hand():
    indices = [np.zeros((9, 1, 1), np.int16)]
    # tokens 2, 3 and 4 are an answer, 5 and 6 another right behind it, 9 is one of a single token
    result = from_sequences(indices, [list(range(12))], [[(2, 5), (5, 7), (9, 10)]], num_experts=2)
    assert np.diff(result.call_offsets).tolist() == [2, 1, 1, 1, 1, 3]
    assert result.call_phase.tolist() == [0, 1, 1, 1, 1, 0]
    assert result.token_ids.tolist() == list(range(9)) and result.ages.tolist() == [1, 0, 0, 0, 0, 0, 2, 1, 0]


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
    assert result.settings["left_out"] == {"too_long": 1, "empty": 0}
    assert result.settings["notes"] == ["1 of 5 rows left out: 1 over 40 tokens"]
    whole = trace(model_and_tokenizer(), data, progress=False)  # the model sees 256 tokens
    assert whole.num_sequences == 5 and whole.settings["max_length"] == 256


def test_mistakes_are_named(tmp_path):
    model, _ = model_and_tokenizer()
    with pytest.raises(MelinoeError, match="together with its tokenizer"):
        trace(model, rows(), progress=False)
    with pytest.raises(MelinoeError, match="an adapter needs a model path"):
        trace(model_and_tokenizer(), rows(), adapter=tmp_path, progress=False)
    with pytest.raises(MelinoeError, match="no such data"):
        trace(model_and_tokenizer(), tmp_path / "missing.jsonl", progress=False)


def test_a_recording_that_lies_in_a_file_is_the_same(monkeypatch, tmp_path):
    """However many rows there are, recording takes the memory of a batch."""
    data, pair = rows(6), model_and_tokenizer()
    small = module.trace(pair, data, tmp_path / "small", progress=False)
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    large = module.trace(pair, data, tmp_path / "large", progress=False)
    assert np.array_equal(large.indices, small.indices)
    assert (tmp_path / "large").read_bytes() == (tmp_path / "small").read_bytes()
    base = large.indices
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)  # and not a copy of it
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large", "small"]


def test_a_trace_is_saved_without_a_second_copy_of_it(tmp_path):
    count = 200_000
    trace = Trace(
        indices=np.zeros((count, 8, 4)),
        call_offsets=np.array([0, count]),
        call_phase=np.zeros(1),
        sequence=np.zeros(count),
        ages=np.zeros(count),
        valid=np.ones(count, bool),
        token_ids=np.zeros(count),
        prompt_lengths=np.ones(1),
        num_experts=8,
    )
    tracemalloc.start()
    trace.save(tmp_path / "a.trace")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < trace.indices.nbytes / 10
    with safe_open(tmp_path / "a.trace", framework="np") as file:  # any tool can read it
        assert file.get_tensor("indices").shape == trace.indices.shape
    assert Trace.load(tmp_path / "a.trace").num_calls == 1
