"""What a server refuses and how it fails: bounds, time, memory of the KV cache, a store that breaks."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

import melinoe
from melinoe.data.encoding import encode_prompt
from melinoe.data.rows import read_rows
from melinoe.errors import MelinoeError
from melinoe.runtime.load import load_tokenizer
from melinoe.serving.settings import ServeSettings
from serving_process import served

LONG = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 400,
    "ignore_eos": True,
}
SHORT = {**LONG, "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def model(tiny_store):
    return melinoe.load(tiny_store, slots=8)


@pytest.fixture
def small(model, tiny_store):
    """One at once, one may wait, short of everything."""
    with served(
        model, tiny_store, concurrency=1, queue=1, timeout_seconds=20, body_bytes=4096, context=450
    ) as (server, _):
        yield server


@contextlib.contextmanager
def streaming(server):
    """A long answer on its way; leaves at the end."""
    with server.http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        yield lines


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_more_than_the_queue_holds_is_told_to_come_back(small):
    with contextlib.ExitStack() as leave, ThreadPoolExecutor(1) as another:
        leave.enter_context(streaming(small))
        waiting = another.submit(small.http.post, "/v1/chat/completions", json=SHORT)
        until(lambda: small.metric("melinoe_requests_waiting") == 1)
        refused = small.http.post("/v1/chat/completions", json=SHORT)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "server_busy"
        assert refused.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            small.openai().chat.completions.create(model="tiny", messages=LONG["messages"], max_tokens=4)
        two = {"model": "tiny", "prompt": [[3], [4]]}
        assert small.http.post("/v1/completions", json=two).status_code == 429
        assert small.metric("melinoe_requests_total", outcome="rejected") == 4
        leave.close()  # the stream ends, and whoever waits has his turn
        assert waiting.result().status_code == 200
    assert small.idle()
    assert small.http.post("/v1/chat/completions", json=SHORT).status_code == 200


def test_a_body_that_is_too_large_is_refused_however_it_comes(small):
    body = json.dumps({**SHORT, "user": "x" * 5000}).encode()
    headers = {"content-type": "application/json"}
    known = small.http.post("/v1/chat/completions", content=body, headers=headers)
    chunked = small.http.post(
        "/v1/chat/completions", content=iter([body[:3000], body[3000:]]), headers=headers
    )
    for answer in (known, chunked):
        assert answer.status_code == 413
        assert "4096 bytes" in answer.json()["error"]["message"]


def test_the_context_bounds_prompt_and_answer(small):
    for wanted in ({"max_tokens": 450}, {"messages": [{"role": "user", "content": "why " * 460}]}):
        answer = small.http.post("/v1/chat/completions", json={**SHORT, **wanted})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "450 tokens" in answer.json()["error"]["message"]


def test_a_request_that_takes_too_long_ends_with_504(model, tiny_store):
    with served(model, tiny_store, timeout_seconds=0.5) as (server, _):
        assert server.http.post("/v1/chat/completions", json=LONG).status_code == 504
        events = server.http.post("/v1/chat/completions", json={**LONG, "stream": True}).text
        *_, error, done = events.strip().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert done == "data: [DONE]"
        assert server.idle()
        assert server.metric("melinoe_requests_total", outcome="failed") == 2
        chunks = server.openai().chat.completions.create(
            model="tiny", messages=LONG["messages"], stream=True, max_tokens=400,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        with pytest.raises(openai.APIError, match="longer than a request may"):
            list(chunks)


@pytest.mark.parametrize("engine", ["batched", "one-at-a-time"])
def test_both_engines_answer_as_generate_does(model, tiny_store, engine):
    """Also where the KV cache holds less than the requests in flight need: some begin again, none is lost."""
    tokenizer = load_tokenizer(tiny_store)
    rows = read_rows("tiny", "test", limit=5)
    wanted = []
    for row in rows:
        ids = torch.tensor([encode_prompt(tokenizer, row.messages)])
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False)
        wanted.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    with served(model, tiny_store, engine=engine, context=80, cached_tokens=128) as (server, service):

        def ask(row):
            answer = server.openai().chat.completions.create(
                model="tiny", messages=list(row.messages), max_tokens=40, temperature=0,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            return answer.choices[0].message.content

        with ThreadPoolExecutor(6) as clients:
            assert list(clients.map(ask, rows)) == wanted
        assert service.engine.name == engine.replace("-", " ")
        assert server.idle()
        if engine == "batched":
            assert server.metric("melinoe_kv_cache_use_ratio") == 0


@pytest.mark.parametrize("engine", ["batched", "one-at-a-time"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_store_that_breaks_ends_in_503_and_a_red_light(tiny_store, tmp_path, engine, streamed):
    store = tmp_path / "store"
    shutil.copytree(tiny_store, store)
    fragile = melinoe.load(store, slots=4)
    with served(fragile, store, engine=engine) as (server, _):
        assert server.http.get("/health").status_code == 200
        for file in store.glob("experts-*"):
            with file.open("r+b") as records:
                records.truncate(8192)
        answer = server.http.post("/v1/chat/completions", json={**LONG, "stream": streamed})
        assert answer.status_code == 503
        reason = answer.json()["error"]["message"]
        assert str(store) in reason
        health = server.http.get("/health")
        assert health.status_code == 503
        assert str(store) in health.json()["reason"]
        assert server.metric("melinoe_healthy") == 0
        assert server.http.post("/v1/chat/completions", json=SHORT).status_code == 503
        assert server.http.get("/v1/models").status_code == 200


def test_settings_that_cannot_be_are_refused():
    for wrong in (
        {"engine": "steam"},
        {"concurrency": 0},
        {"api_key": ""},
        {"served_model_names": ()},
        {"timeout_seconds": 0},
    ):
        with pytest.raises(MelinoeError):
            ServeSettings(**wrong)
