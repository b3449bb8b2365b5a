"""`melinoe serve` as a process, and OpenAI's own client: the answers are those of offline generation.

The model is the embedded one with 8 of 32 slots per layer, in bfloat16.
"""

from __future__ import annotations

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

import melinoe
from melinoe.data.encoding import encode_prompt
from melinoe.data.rows import read_rows
from melinoe.runtime.load import load_tokenizer
from serving_process import ServerProcess

KEY = "a key of ours"
NAME = "tiny"
TOKENS = 16


@pytest.fixture(scope="module")
def server(tiny_store, tmp_path_factory):
    started = ServerProcess(
        *("--model", str(tiny_store), "--slots", "8", "--served-model-name", NAME, "--api-key", KEY),
        *("--drain", "60", "--concurrency", "8"),
        log=tmp_path_factory.mktemp("serving") / "log",
        key=KEY,
    )
    yield started
    started.kill()


@pytest.fixture(scope="module")
def offline(tiny_store):
    """The same store, opened here."""
    return melinoe.load(tiny_store, slots=8), load_tokenizer(tiny_store)


@pytest.fixture(scope="module")
def conversations(offline):
    """Twelve whose answers the model is sure of: beside others the last digit of a logit may be another."""
    model, tokenizer = offline
    sure = []
    for row in read_rows("tiny", "test", limit=60):
        ids = torch.tensor([encode_prompt(tokenizer, row.messages)])
        settings = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), output_logits=True, **settings)
        best = torch.cat(made.logits).topk(2).values  # [tokens, 2], about 10 in bfloat16
        if float((best[:, 0] - best[:, 1]).min()) > 0.3:
            sure.append(list(row.messages))
    assert len(sure) >= 12
    return sure[:12]


def expected(offline, messages, tokens=TOKENS, seed=None, **settings):
    """Offline: (text, token ids)."""
    model, tokenizer = offline
    ids = torch.tensor([encode_prompt(tokenizer, tuple(messages))])
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=seed is not None,
            **settings,
        )[0, ids.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True), made.tolist()


def ask(server, messages, **settings):
    return server.openai().chat.completions.create(
        model=NAME, messages=messages, **{"max_tokens": TOKENS, "temperature": 0, **settings}
    )


def test_an_answer_is_that_of_offline_generation(server, offline, conversations):
    for messages in conversations[:3]:
        text, tokens = expected(offline, messages)
        found = ask(server, messages)
        assert found.choices[0].message.content == text
        assert found.usage.completion_tokens == len(tokens)
        assert found.usage.prompt_tokens == len(encode_prompt(offline[1], tuple(messages)))
        assert found.choices[0].finish_reason == ("length" if len(tokens) == TOKENS else "stop")


def test_answers_in_company_are_those_of_offline_generation(server, offline, conversations):
    """Twelve clients at once, half of them streaming."""
    wanted = [expected(offline, messages)[0] for messages in conversations]

    def client(number):
        order = conversations[number:] + conversations[:number]
        answers = wanted[number:] + wanted[:number]
        for messages, text in list(zip(order, answers, strict=True))[:3]:
            if number % 2:
                pieces = ask(server, messages, stream=True)
                found = "".join(piece.choices[0].delta.content or "" for piece in pieces)
            else:
                found = ask(server, messages).choices[0].message.content
            assert found == text
        return 3

    with ThreadPoolExecutor(12) as clients:
        assert sum(clients.map(client, range(12))) == 36
    assert server.idle()


def test_a_stream_is_the_answer_in_pieces(server, conversations):
    whole = ask(server, conversations[0])
    body = {"model": NAME, "messages": conversations[0], "max_tokens": TOKENS, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    events = server.http.post("/v1/chat/completions", json=body).text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole.usage.completion_tokens
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert len(chunks) > 5


def test_a_seed_gives_its_answer_in_any_company(server, offline, conversations):
    """And it is the one that `generate` draws after torch.manual_seed."""
    settings = {"temperature": 0.9, "top_p": 0.95, "extra_body": {"top_k": 40, "min_p": 0.01}}
    wanted = [
        expected(offline, messages, seed=seed, temperature=0.9, top_p=0.95, top_k=40, min_p=0.01)[0]
        for seed, messages in enumerate(conversations[:4])
    ]
    alone = [
        ask(server, messages, seed=seed, **settings).choices[0].message.content
        for seed, messages in enumerate(conversations[:2])
    ]
    assert alone == wanted[:2]
    with ThreadPoolExecutor(8) as clients:
        noise = [
            clients.submit(ask, server, messages, temperature=1.5, seed=99) for messages in conversations[8:]
        ]
        found = [
            clients.submit(ask, server, messages, seed=seed, **settings)
            for seed, messages in reversed(list(enumerate(conversations[:4])))
        ]
        assert [answer.result().choices[0].message.content for answer in reversed(found)] == wanted
        assert all(answer.result().choices for answer in noise)
    assert len(set(wanted)) > 2


def test_without_a_seed_answers_differ(server):
    """To a prompt that the model does not know; it is too sure of those it was trained on."""
    unsure = [{"role": "user", "content": "hi"}]
    answers = {ask(server, unsure, temperature=2).choices[0].message.content for _ in range(4)}
    assert len(answers) > 1


def test_repetition_penalty_is_that_of_transformers(server, offline, conversations):
    text, _ = expected(offline, conversations[1], repetition_penalty=1.5)
    found = ask(server, conversations[1], extra_body={"repetition_penalty": 1.5})
    assert found.choices[0].message.content == text


def test_a_stop_string_ends_the_answer_and_is_never_shown(server, offline, conversations):
    for messages in conversations[:3]:
        text, tokens = expected(offline, messages)
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        kept = text[: text.index(stop)]
        whole = ask(server, messages, stop=stop)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (kept, "stop")
        assert whole.usage.completion_tokens < len(tokens) or len(tokens) < 4
        seen = ""
        for chunk in ask(server, messages, stop=["never said", stop], stream=True):
            seen += chunk.choices[0].delta.content or ""
            assert kept.startswith(seen)
        assert seen == kept
    assert server.idle()


def test_logprobs_are_those_of_the_model(server, offline, conversations):
    model, tokenizer = offline
    found = ask(
        server, conversations[0], max_tokens=4, logprobs=True, top_logprobs=3, temperature=0.7, seed=3
    )
    shown = found.choices[0].logprobs.content
    assert len(shown) == 4
    ids = encode_prompt(tokenizer, tuple(conversations[0]))
    for entry in shown:
        with torch.no_grad():
            own = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        best = own.topk(3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=0.05)
        assert entry.top_logprobs[0].token == tokenizer.decode([int(best.indices[0])])
        token = int(torch.argmin((own - entry.logprob).abs()))
        assert entry.token == tokenizer.decode([token])
        ids.append(token)


def test_completions_take_text_and_token_ids(server, offline):
    _, tokenizer = offline
    ids = tokenizer("What is 12 plus 7?")["input_ids"]
    client = server.openai()
    text = client.completions.create(model=NAME, prompt="What is 12 plus 7?", max_tokens=8, temperature=0)
    both = client.completions.create(
        model=NAME, prompt=[ids, ids[:3]], max_tokens=8, temperature=0, logprobs=2
    )
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == text.choices[0].text
    assert len(both.choices[0].logprobs.top_logprobs[0]) == 2
    assert both.usage.prompt_tokens == len(ids) + 3
    streamed = {0: "", 1: ""}
    for chunk in client.completions.create(
        model=NAME, prompt=[ids, ids[:3]], max_tokens=8, temperature=0, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == {0: both.choices[0].text, 1: both.choices[1].text}


def test_earlier_turns_are_not_computed_again(server, offline, conversations):
    messages = [*conversations[2], {"role": "assistant", "content": "forty two " * 8}]
    messages += [{"role": "user", "content": "And then?"}]
    first = ask(server, messages)
    cached = server.metric("melinoe_cached_prompt_tokens_total")
    longer = [*messages, {"role": "assistant", "content": first.choices[0].message.content}]
    longer += [{"role": "user", "content": "Why?"}]
    second = ask(server, longer)
    reused = second.usage.prompt_tokens_details.cached_tokens
    assert reused >= first.usage.prompt_tokens - 16  # whole blocks of 16
    assert server.metric("melinoe_cached_prompt_tokens_total") == cached + reused
    assert second.choices[0].message.content == expected(offline, longer)[0]


def test_models_health_and_metrics(server):
    client = server.openai()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "melinoe"
    assert server.http.get("/health").json() == {"status": "ok", "reason": None}
    assert server.metric("melinoe_healthy") == 1
    hits = server.metric("melinoe_expert_cache_hits_total", phase="decode")
    misses = server.metric("melinoe_expert_cache_misses_total", phase="decode")
    first = server.metric("melinoe_time_to_first_token_seconds_count")
    tokens = server.metric("melinoe_generated_tokens_total")
    found = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=9,
        extra_body={"ignore_eos": True},
    )
    assert found.usage.completion_tokens == 9
    assert server.metric("melinoe_expert_cache_hits_total", phase="decode") > hits
    assert server.metric("melinoe_expert_cache_misses_total", phase="decode") > misses
    assert server.metric("melinoe_expert_transfer_bytes_total", phase="decode") > 0
    assert server.metric("melinoe_time_to_first_token_seconds_count") == first + 1
    assert server.metric("melinoe_generated_tokens_total") == tokens + 9
    slots = server.metric("melinoe_expert_slots")
    assert 0 < server.metric("melinoe_expert_slots_in_use") <= slots


def test_a_client_that_leaves_frees_its_work_within_a_second(server):
    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400}
    body |= {"ignore_eos": True}
    with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        lines = answer.iter_lines()  # dropping it would close the connection
        next(lines)
        assert server.metric("melinoe_requests_running") == 1
    assert server.idle(1.0)
    with pytest.raises(httpx.ReadTimeout):  # an answer that is not streamed, given up
        server.http.post("/v1/chat/completions", json=body, timeout=0.5)
    assert server.idle(1.0)
    assert server.metric("melinoe_requests_total", outcome="cancelled") >= 2


def message(content):
    return {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": 2}


HOSTILE = {
    "no JSON": b"{",
    "nothing": b"",
    "a number": b"5",
    "another encoding": '{"model": "tiny"}'.encode("utf-16"),
    "bad UTF-8": json.dumps(message("@")).encode().replace(b"@", b"\xff"),
    "half a surrogate pair": json.dumps(message("@")).encode().replace(b"@", b"\\ud800"),
    "a field named by half a pair": b'{"model": "tiny", "messages": [], "\\udfff": 1}',
    "a model named by half a pair": json.dumps({**message("x"), "model": "@"})
    .encode()
    .replace(b"@", b"\\ud800"),
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a number of 5000 digits": b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}",
    "a prompt of 10 MB": json.dumps(message("x" * 10_000_000)).encode(),
    "a prompt beyond the context": json.dumps(message("why " * 3000)).encode(),
    "not a number": json.dumps({**message("x"), "temperature": float("nan")}).encode(),
    "an unknown field": json.dumps({**message("x"), "nonsense": 1}).encode(),
    "a number as text": json.dumps({**message("x"), "temperature": "0.5"}).encode(),
    "truth as a number": json.dumps({**message("x"), "seed": True}).encode(),
    "too hot": json.dumps({**message("x"), "temperature": 9}).encode(),
    "two answers": json.dumps({**message("x"), "n": 2}).encode(),
    "a penalty": json.dumps({**message("x"), "presence_penalty": 0.5}).encode(),
    "no tokens": json.dumps({**message("x"), "max_tokens": 0}).encode(),
    "too many tokens": json.dumps({**message("x"), "max_tokens": 10**9}).encode(),
    "an empty stop": json.dumps({**message("x"), "stop": [""]}).encode(),
    "no messages": json.dumps({**message("x"), "messages": []}).encode(),
    "a message without text": json.dumps({**message("x"), "messages": [{"role": "user"}]}).encode(),
    "a role of its own": json.dumps(
        {**message("x"), "messages": [{"role": "king", "content": "x"}]}
    ).encode(),
    "a picture": json.dumps(message([{"type": "image_url", "image_url": {"url": "file:///etc"}}])).encode(),
    "another model": json.dumps({**message("x"), "model": "gpt-4o"}).encode(),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_wrong_is_refused_in_openais_shape(server, kind):
    answer = server.http.post(
        "/v1/chat/completions", content=HOSTILE[kind], headers={"content-type": "application/json"}
    )
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert len(error["message"]) < 500


def test_token_ids_beyond_the_vocabulary_are_refused(server):
    for prompt in ([10**6], [[3], [-1]], [], [[]], ""):
        body = {"model": NAME, "prompt": prompt}
        assert server.http.post("/v1/completions", json=body).status_code == 400


def test_it_lives_after_all_that(server, offline, conversations):
    assert server.idle()
    assert ask(server, conversations[0]).choices[0].message.content == expected(offline, conversations[0])[0]


def test_errors_reach_openais_client(server):
    with pytest.raises(openai.NotFoundError, match="no model"):
        server.openai().chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, [{"role": "user", "content": "x"}], max_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.http.get("/v1/models", headers={"host": "example.com"}).status_code == 403
    assert server.http.get("/nothing").json()["error"]["message"]
    assert server.http.get("/v1/completions").status_code == 405
    plain = server.http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 400


def test_sigterm_drains_and_exits_with_0(server):
    """The last test of this file: a stream that runs comes to its end, new clients are refused."""
    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 60}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    lines: list[str] = []
    begun = threading.Event()

    def stream():
        with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=stream)
    reader.start()
    assert begun.wait(60)
    server.process.send_signal(signal.SIGTERM)
    reader.join(90)
    assert server.process.wait(30) == 0
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert any('"completion_tokens":60' in line for line in lines)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
