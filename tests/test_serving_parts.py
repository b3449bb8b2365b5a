"""The parts of a server by themselves: text, stop strings, sampling, shared prior, places, tool calls."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from tokenizers import processors
from transformers import GenerationConfig

import melinoe
from melinoe.data.encoding import encode_prompt
from melinoe.errors import MelinoeError
from melinoe.prediction.predictor import Predictor
from melinoe.routing.policies import INITIAL_TRUST, DecayedCounts, decode_call
from melinoe.runtime.answer_text import AnswerText
from melinoe.runtime.generation_settings import Sampling, end_tokens, stop_strings
from melinoe.serving.engine import batched
from melinoe.serving.engine.sampling import sampler
from melinoe.serving.engine.start import start_engine
from melinoe.serving.http.admission import Admission
from melinoe.serving.http.errors import ApiError
from melinoe.serving.http.prompts import Prompts
from melinoe.serving.http.protocol import ChatRequest, CompletionRequest
from melinoe.serving.http.responses import ResponsesRequest
from melinoe.serving.http.tools import ToolCalls
from melinoe.serving.metrics import Metrics
from melinoe.serving.settings import ServeSettings
from text_model import tokenizer as characters
from tokenizers_of_all_kinds import byte_fallback, byte_level

LETTERS = characters()
few = st.text("ab.", min_size=0, max_size=30)


@given(few, st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_and_shows_nothing_of_it(text, stops):
    ends = [text.index(stop) for stop in stops if stop in text]
    # the answer is over with the token that completes a stop string; the earliest completed one counts
    done = min((text.index(stop) + len(stop) for stop in stops if stop in text), default=None)
    found = [text.index(stop) for stop in stops if stop in text and text.index(stop) + len(stop) == done]
    answer, shown = AnswerText(LETTERS, stops), ""
    for token in LETTERS(text)["input_ids"]:
        shown += answer.add(token)
        if answer.stopped:
            break
    shown += answer.finish()
    assert answer.stopped == bool(ends)
    assert shown == (text[: min(found)] if found else text)


def test_a_stop_string_of_half_characters_in_tokens_is_found():
    tokenizer = byte_fallback()
    tokens = [3 + byte for byte in "a你😀b".encode()]
    answer, shown = AnswerText(tokenizer, ["😀"]), ""
    for token in [*tokens, *tokenizer("x")["input_ids"]]:
        shown += answer.add(token)
        if answer.stopped:
            break
    shown += answer.finish()
    assert (answer.stopped, shown) == (True, "a你")


SETTINGS = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.7},
    "top p": {"temperature": 1.0, "top_p": 0.6},
    "top k": {"temperature": 1.3, "top_k": 7},
    "min p": {"temperature": 1.0, "min_p": 0.2},
    "penalty": {"temperature": 0.0, "repetition_penalty": 1.4},
    "all": {"temperature": 0.9, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_sampler_chooses_what_generate_chooses(kind, olmoe_store):
    """With the checkpoint's own settings below, as they stand in its generation_config."""
    model = melinoe.load(olmoe_store, slots=8)
    model.generation_config.suppress_tokens = [7, 8]
    settings, prompt = SETTINGS[kind], [3, 4, 5]
    chooser = sampler(model, LETTERS, prompt, 12, Sampling(**settings), seed=5, ignore_eos=True)
    tokens = list(prompt)
    drawn = settings["temperature"] > 0
    with torch.no_grad():
        for _ in range(12):
            tokens.append(chooser.choose(model(torch.tensor([tokens])).logits[0, -1].float()).token)
        torch.manual_seed(5)
        plain = {name: value for name, value in settings.items() if name != "temperature" or drawn}
        made = model.generate(
            torch.tensor([prompt]), do_sample=drawn, max_new_tokens=12, min_new_tokens=12, **plain
        )
    assert tokens == made[0].tolist()


# everything else in a generation_config that changes which token is chosen
OF_CHECKPOINTS = {
    "repeats": {"no_repeat_ngram_size": 2},
    "repeats of the prompt": {"encoder_no_repeat_ngram_size": 1},
    "words of the prompt": {"encoder_repetition_penalty": 3.0},
    "penalty": {"repetition_penalty": 1.7},
    "lengths": {"min_length": 12, "eos_token_id": [1, *range(5, 60, 2)]},
    "new tokens": {"min_new_tokens": 9, "eos_token_id": [1, *range(5, 60, 2)]},
    "ends": {"exponential_decay_length_penalty": (2, 1.7), "eos_token_id": 9},
    "words": {"bad_words_ids": [[5], [7, 8]], "begin_suppress_tokens": [33]},
    "forced": {"forced_bos_token_id": 4, "forced_eos_token_id": 6},
    "biases": {"sequence_bias": [[[5], -3.0], [[6], 4.0]]},
    "guided": {"guidance_scale": 1.6},
    "typical": {"do_sample": True, "typical_p": 0.7},
    "cut off": {"do_sample": True, "epsilon_cutoff": 0.03, "eta_cutoff": 0.02},
    "drawn": {"do_sample": True, "temperature": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    "normal": {"do_sample": True, "renormalize_logits": True, "remove_invalid_values": True},
}


@pytest.mark.parametrize("kind", OF_CHECKPOINTS)
def test_a_sampler_follows_the_checkpoint_as_generate_does(kind, olmoe_store):
    model, prompt = melinoe.load(olmoe_store, slots=8), [3, 4, 5, 33, 9]
    model.generation_config.update(**OF_CHECKPOINTS[kind])
    ends = end_tokens(model.generation_config, LETTERS)
    with torch.no_grad():
        torch.manual_seed(5)
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12)[0].tolist()
        chooser, tokens = sampler(model, LETTERS, prompt, 12, seed=5), list(prompt)
        while len(tokens) < len(prompt) + 12 and (tokens == prompt or tokens[-1] not in ends):
            tokens.append(chooser.choose(model(torch.tensor([tokens])).logits[0, -1].float()).token)
    assert tokens == expected


def test_what_runs_the_model_between_tokens_is_not_batched(olmoe_store, capsys):
    model = melinoe.load(olmoe_store, slots=8)
    model.generation_config.guidance_scale = 1.6
    settings = ServeSettings(concurrency=2, context=64, engine="batched")
    with pytest.raises(MelinoeError, match="guidance_scale"):
        start_engine(model, LETTERS, settings)
    engine = start_engine(model, LETTERS, replace(settings, engine="auto"))
    engine.stop()
    assert engine.name == "one at a time" and "guidance_scale" in capsys.readouterr().err


def test_a_stop_string_that_is_a_token_of_its_own_ends_the_text():
    """It has no text among tokens; one that is asked for, and one of the checkpoint's."""
    words = copy.deepcopy(LETTERS)
    words.add_special_tokens({"additional_special_tokens": ["<|over|>"]})
    over, seen = words.convert_tokens_to_ids("<|over|>"), words("abc")["input_ids"]
    for stops in (["<|over|>"], ["xyz", "<|over|>", "cx"]):
        answer = AnswerText(words, stops)
        shown = "".join(map(answer.add, [*seen, over]))
        assert answer.stopped and shown + answer.finish() == "abc"


def test_a_stop_string_with_a_special_token_in_it_ends_the_text():
    """As transformers' StopStringCriteria has it; the token itself is no text, whether it ends one or not."""
    words = copy.deepcopy(LETTERS)
    words.add_special_tokens({"additional_special_tokens": ["<|over|>", "<|over|>>"]})
    (over,), (longer,) = (words(text)["input_ids"] for text in ("<|over|>", "<|over|>>"))
    a, b, c = words("abc")["input_ids"]
    cases = {
        (a, over, b, c): (True, "a"),
        (a, over, c, b): (False, "acb"),
        (a, b, over): (False, "ab"),
        (a, longer, b): (False, "ab"),
        (c, a, over, over, b): (True, "ca"),
        (a, longer, a): (True, ""),
    }
    for tokens, (stopped, expected) in cases.items():
        answer, shown = AnswerText(words, ["<|over|>b", "a<|over|>>a"]), ""
        for token in tokens:
            shown += answer.add(token)
            if answer.stopped:
                break
        assert (answer.stopped, shown + answer.finish()) == (stopped, expected)


def test_messages_that_the_template_does_not_write_are_refused():
    words = copy.deepcopy(LETTERS)
    words.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    asked = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "ab"}]
    prompts = Prompts(words, 99, 64)
    with pytest.raises(ApiError, match="does not write system messages"):
        prompts.of_chat(chat(messages=asked, tools=None))
    assert prompts.of_chat(chat(messages=asked[1:], tools=None)) == words("ab")["input_ids"]


@pytest.mark.parametrize("named", ["ab", ["ab"], ["x", "ab"], None])
def test_one_stop_string_is_not_its_letters(named):
    assert stop_strings(GenerationConfig(stop_strings=named)) == (
        [] if named is None else [named] if isinstance(named, str) else named
    )


def test_what_the_checkpoint_says_holds_where_the_request_says_nothing(olmoe_store):
    model = melinoe.load(olmoe_store, slots=8)
    model.generation_config.update(do_sample=True, temperature=0.5, top_k=3, num_beams=4, eos_token_id=[1, 9])
    assert end_tokens(model.generation_config, LETTERS) == [1, 9]

    def chosen(**settings):
        return sampler(model, LETTERS, [3], 4, Sampling(**settings))

    assert "TopK" in str(chosen()._processors)
    assert "TopK" not in str(chosen(top_k=0)._processors)
    assert not chosen(temperature=0.0)._drawn
    model.generation_config.do_sample = False
    assert not chosen()._drawn
    assert chosen(top_p=0.5)._drawn  # whoever narrows down wants to draw


def test_the_prior_is_the_mean_of_who_is_in_flight(olmoe_store):
    model = melinoe.load(olmoe_store, slots=2)
    paged = model.melinoe_paged
    paged.predictor = Predictor(torch.randn(64, 16).half(), 2, 8, 2).eval()
    (one, worth_one), (two, worth_two) = (paged.predictor.predict([3, 4, token]) for token in (5, 6))
    policy, step = paged.pager.policy, np.array([0, 1, 2])

    def after(sequences):
        paged.share_predictions(sequences)
        paged._before_continuous_batch(step, 2)
        return policy.prior

    worth = paged.predictor.strength.tokens
    assert after({"a": (one, worth_one)}) == pytest.approx(one * worth)
    policy.counts += 3.0
    policy.trust_log_odds = 1.0
    assert after({"a": (one, worth_one), "b": (two, worth_two)}) == pytest.approx((one + two) / 2 * worth)
    assert policy.trust_log_odds == pytest.approx((1.0 + INITIAL_TRUST) / 2)  # half of it is new
    assert after({"b": (two, worth_two)}) == pytest.approx(two * worth)
    assert policy.trust_log_odds == pytest.approx((1.0 + INITIAL_TRUST) / 2)
    assert policy.counts.min() == 3.0  # the evidence stays
    assert after({}) is None


def test_what_decodes_beside_a_prompt_counts_as_decoding(olmoe_store):
    model = melinoe.load(olmoe_store, slots=4)
    paged = model.melinoe_paged

    def step(ends, experts):
        paged._before_continuous_batch(np.array(ends), ends[-1])
        for _ in paged.pager.serve(0, paged.call(np.array(experts))):
            pass
        counted = melinoe.stats(model)
        return counted.decode_requests, counted.decode_hits, counted.prefill_requests, counted.prefill_hits

    assert step([0, 2], [[0, 1], [0, 2]]) == (0, 0, 3, 0)
    assert step([0, 1, 3], [[0, 5], [0, 1], [2, 4]]) == (2, 1, 3 + 3, 2)  # 0 is asked for by both
    assert step([0, 1, 2], [[6, 7], [6, 7]]) == (2 + 2, 1, 6, 2)
    counted = melinoe.stats(model)
    assert (counted.decode_tokens, counted.prefill_tokens) == (3, 4)
    assert counted.decode_loads == 3 and counted.decode_bytes == 3 * paged.pager.store.max_record_bytes
    step([0, 1, 3], [[0, 5], [0, 1], [2, 4]])
    before = melinoe.stats(model).decode_requests
    model(torch.tensor([[3, 4, 5]]))  # of another kind: nothing of the mixed pass is left in it
    assert melinoe.stats(model).decode_requests == before


def test_a_request_that_begins_alone_forgets_the_trust_of_the_one_before():
    policy = DecayedCounts(1, 4, 2)
    scores = np.array([[1.0, 0.5, 0.3, 0.2]])
    policy.begin(scores)
    for _ in range(5):
        policy.request(0, decode_call([3, 2]))
    assert policy.trust_log_odds < INITIAL_TRUST and policy.decoded == [5]
    policy.begin(scores, kept=1.0)
    assert policy.trust_log_odds < INITIAL_TRUST and policy.decoded == [5]
    policy.begin(scores)
    assert policy.trust_log_odds == INITIAL_TRUST and policy.decoded == [0]


def test_transformers_has_what_the_batched_engine_builds_on(monkeypatch):
    assert batched._unlike() is None
    monkeypatch.setattr(batched.ModelRunner, "_sample", lambda self, scores: None)
    assert "ModelRunner._sample" in batched._unlike()


@pytest.mark.parametrize("theirs", [None, "7"])
def test_kernels_that_are_kept_for_every_number_of_rows_are_bounded(monkeypatch, tiny_store, theirs):
    """Else a server grows with the lengths of prompts that it has seen: 0.25 MiB with every request."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.setenv(name, theirs or "")
        if theirs is None:
            monkeypatch.delenv(name)
    melinoe.load(tiny_store, slots=8)
    assert [os.environ[name] for name in names] == ([theirs] * 2 if theirs else ["128", "1"])


def test_places_are_given_back_whatever_happens():
    async def all_of_it():
        places = Admission(1, 1)
        places.enter(2)
        with pytest.raises(ApiError, match="busy"):
            places.enter(1)
        holding = asyncio.Event()

        async def run(until):
            async with places.place():
                holding.set()
                await until.wait()

        forever = asyncio.Event()
        first = asyncio.create_task(run(forever))
        await holding.wait()
        second = asyncio.create_task(run(forever))
        await asyncio.sleep(0)
        assert (places.running, places.waiting) == (1, 1)
        second.cancel()  # while it waits
        await asyncio.gather(second, return_exceptions=True)
        assert (places.running, places.waiting) == (1, 0)
        first.cancel()  # while it runs
        await asyncio.gather(first, return_exceptions=True)
        assert (places.running, places.waiting) == (0, 0)
        places.enter(2)
        places.leave(2)
        assert places.waiting == 0

    asyncio.run(all_of_it())


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def chat(**more):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [TOOL], **more}
    return ChatRequest.model_validate(body)


def test_calls_of_tools_are_read_where_transformers_can():
    tokenizer, model = byte_level(), SimpleNamespace(config=SimpleNamespace(model_type="qwen3_moe"))
    assert ToolCalls.of(tokenizer, model, chat(tool_choice="none")) is None
    unknown = SimpleNamespace(config=SimpleNamespace(model_type="olmoe"))
    assert ToolCalls.of(tokenizer, unknown, chat()) is None
    calls = ToolCalls.of(tokenizer, model, chat())
    text = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    prompt = tokenizer("<|im_start|>assistant\n")["input_ids"]
    request = SimpleNamespace(tokens=tokenizer(text)["input_ids"], prompt=prompt)
    message, reason = calls.message(request, text, "stop")
    assert reason == "tool_calls"
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Köln"}
    assert message["content"] == "Let me see."
    broken = SimpleNamespace(tokens=tokenizer("<tool_call>{")["input_ids"], prompt=prompt)
    message, reason = calls.message(broken, "<tool_call>{", "length")
    assert reason == "length" and "tool_calls" not in message


def test_tools_that_the_template_does_not_write_are_refused():
    """The answer would be that to another question, without a word."""
    words = copy.deepcopy(LETTERS)
    prompts = Prompts(words, 99, 64)
    with pytest.raises(ApiError, match="does not write tools"):
        prompts.of_chat(chat())
    assert prompts.of_chat(chat(tool_choice="none")) == prompts.of_chat(chat(tools=None))
    words.chat_template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + words.chat_template
    assert words.decode(prompts.of_chat(chat())).startswith("weather")


def test_a_text_to_go_on_with_does_not_end_with_an_end_token():
    """Which some tokenizers put behind every text; `generate --raw` goes on behind the last word."""
    words = copy.deepcopy(LETTERS)
    special = [(token, words.convert_tokens_to_ids(token)) for token in ("<sep>", "<eos>")]
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<sep> $A <eos>", special_tokens=special
    )
    whole = words("abc")["input_ids"]
    assert (
        Prompts(words, 99, 64).of_text("abc", "prompt") == encode_prompt(words, "abc", raw=True) == whole[:-1]
    )
    words.chat_template = None
    asked = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "abc"}]})
    assert Prompts(words, 99, 64).of_chat(asked) == encode_prompt(words, "abc") == whole[:-1]


def test_the_dashboard_draws_what_the_server_counts(olmoe_store):
    metrics = Metrics()
    metrics.watch_experts(melinoe.load(olmoe_store, slots=2))
    shown = generate_latest(metrics.registry).decode()
    page = (Path(__file__).parents[1] / "docs" / "grafana.json").read_text()
    drawn = set(re.findall(r"\b(?:melinoe|process)_\w+", page))
    assert len(drawn) > 15
    assert not [name for name in drawn if f"# HELP {name.removesuffix('_bucket')} " not in shown]


def test_the_document_has_the_bounds_that_are_kept():
    """Under JSON schema's own names: pydantic writes others where a validator stands before them."""

    def bounds(schema):
        if isinstance(schema, dict):
            yield from schema.keys()
            for value in schema.values():
                yield from bounds(value)
        elif isinstance(schema, list):
            for value in schema:
                yield from bounds(value)

    for body in (ChatRequest, CompletionRequest, ResponsesRequest):
        names = set(bounds(body.model_json_schema()))
        assert not names & {"ge", "gt", "le", "lt", "min_length", "max_length"}
        assert "minimum" in names and "exclusiveMaximum" in names


@pytest.mark.parametrize(
    "wrong", [{"n": True}, {"store": 0}, {"store": 1}, {"store": True}, {"presence_penalty": 0.5}], ids=str
)
def test_what_is_only_equal_is_not_taken(wrong):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    assert ChatRequest.model_validate({**body, "store": False, "n": 1.0, "presence_penalty": 0}).n == 1
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ChatRequest.model_validate({**body, **wrong})
