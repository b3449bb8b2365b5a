"""The page at / in a real browser, and the stream of expert events that it draws."""

from __future__ import annotations

import json
import signal
import time

import httpx
import pytest
from transformers import AutoModelForCausalLM

import melinoe
from browsing import in_browser, started_browser
from melinoe.models.folder import resolve_model
from melinoe.serving.page.experts import MOST_WATCHERS
from serving_process import ServerProcess, served

HOSTILE = "</p><img src=x onerror='window.hacked=1'><script>window.hacked=1</script><b>*x*</b>&amp;\n\ttwo"
QUESTION = "sort 3,1,2"


@pytest.fixture(scope="module")
def model(tiny_store):
    return melinoe.load(tiny_store, slots=4)


@pytest.fixture(scope="module")
def server(model, tiny_store):
    with served(model, tiny_store, timeout_seconds=60) as (server, _):
        yield server


@pytest.fixture(scope="module")
def another(tiny_store):
    """For servers of one test: a model belongs to one engine at a time."""
    return melinoe.load(tiny_store, slots=4)


@pytest.fixture(scope="module")
def browser():
    yield from started_browser()


@pytest.fixture
def open_page(browser):
    """Opens the page of a server; anything written to the browser's console fails the test."""
    said, contexts = [], []

    def open_page(url, **settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [line for line in said if "Failed to load resource" not in line] == []


def until(page, script):
    """Waits until the script is true. Playwright's own way would have the page run text, which it may not."""
    end = time.monotonic() + 20
    while not page.evaluate(script):
        assert time.monotonic() < end, script
        page.wait_for_timeout(20)


def set_up(page, **fields):
    page.locator("summary").click()
    for name, value in fields.items():
        page.locator(f"#{name}").fill(value)


def ask(page, text, answers):
    """Asks with the keyboard and waits for the end of the answer, the so-manieth."""
    page.locator("#question").fill(text)
    page.keyboard.press("Enter")
    page.locator(".assistant .note").nth(answers - 1).wait_for()
    return page.locator(".assistant p").nth(answers - 1).text_content()


@in_browser
def test_turns_with_the_settings_and_what_experts_did(server, open_page):
    page = open_page(server.url)
    page.locator("#experts").wait_for()
    assert page.locator("#model").text_content() == "tiny"
    set_up(page, temperature="0", tokens="12", system="Be brief.")
    first = ask(page, QUESTION, 1)
    with page.expect_request("**/chat/completions") as sent:
        second = ask(page, "sort 9,8", 2)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "sort 9,8"},
    ]
    asked = sent.value.post_data_json
    assert (asked["messages"], asked["temperature"], asked["max_completion_tokens"]) == (messages, 0, 12)
    for answer, end in ((first, 2), (second, 4)):
        same = server.openai().chat.completions.create(
            model="tiny", messages=messages[:end], temperature=0, max_tokens=12
        )
        assert answer == same.choices[0].message.content
    assert "of " in page.locator(".note").nth(1).text_content()  # prompt tokens known from before
    until(page, "document.getElementById('rate').textContent.endsWith('%')")
    assert page.locator("#moved").text_content().endswith("iB")
    page.locator("#new").click()
    assert page.locator(".turn").count() == 0


@in_browser
def test_what_models_and_servers_say_stays_text(another, tiny_store, open_page):
    with served(another, tiny_store, served_model_names=(HOSTILE,)) as (server, _):
        page = open_page(server.url)
        until(page, "document.getElementById('model').textContent")
        assert page.locator("#model").text_content() == HOSTILE

        def answer(route):
            chunks = [
                {"choices": [{"index": 0, "delta": {"content": HOSTILE}, "finish_reason": None}]},
                {"error": {"message": HOSTILE}},
            ]
            body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
            route.fulfill(status=200, content_type="text/event-stream", body=body)

        page.route("**/chat/completions", answer)
        assert ask(page, HOSTILE, 1) == HOSTILE
        assert page.locator(".user p").text_content() == HOSTILE
        assert page.locator(".error").text_content() == HOSTILE
        assert page.locator("#log img, #log script, #log b, header img").count() == 0
        assert page.evaluate("window.hacked === undefined")


@in_browser
def test_even_markup_on_the_page_could_not_run_or_speak_to_others(server, browser):
    page = browser.new_page()
    page.goto(server.url)
    page.evaluate(
        """() => {
            window.refused = [];
            document.addEventListener("securitypolicyviolation", (e) => refused.push(e.effectiveDirective));
            document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.hacked=1'>");
            document.body.append(Object.assign(document.createElement("script"), {text: "window.hacked=1"}));
            fetch("https://example.org/").catch(() => {});
        }"""
    )
    until(page, "['script-src', 'img-src', 'connect-src'].every("
                           "one => refused.some(each => each.startsWith(one)))")  # fmt: skip
    assert page.evaluate("window.hacked === undefined")
    page.close()


@in_browser
def test_an_answer_is_stopped_and_stays_as_far_as_it_was_said(another, tiny_store, open_page):
    with served(another, tiny_store, concurrency=1) as (server, _):
        page = open_page(server.url)
        page.route(  # a model that would speak on and on
            "**/chat/completions",
            lambda route: route.continue_(
                post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True})
            ),
        )
        until(page, "document.getElementById('model').textContent")
        for number, how in enumerate((lambda: page.locator("#stop").click(),
                                      lambda: page.keyboard.press("Escape")), 1):  # fmt: skip
            page.locator("#question").fill(QUESTION)
            page.keyboard.press("Enter")
            until(page, f"document.querySelectorAll('.assistant p')[{number - 1}]?.textContent.length > 3")
            how()
            page.locator(".assistant .note").nth(number - 1).wait_for()
            assert "stopped" in page.locator(".assistant .note").nth(number - 1).text_content()
            assert server.idle()
        assert page.evaluate("document.activeElement.id") == "question"
        assert page.evaluate("turns.map(turn => turn.role)") == ["user", "assistant"] * 2


@in_browser
def test_errors_are_shown_in_words_and_the_question_is_kept(server, open_page):
    page = open_page(server.url)
    until(page, "document.getElementById('model').textContent")
    set_up(page, tokens="1000000")
    page.locator("#question").fill(QUESTION)
    page.locator("#send").click()
    error = page.locator("[role=alert]")
    error.wait_for()
    assert "maximum context length" in error.text_content()
    assert page.locator("#question").input_value() == QUESTION
    page.locator("#tokens").fill("4")
    ask(page, QUESTION, 1)
    assert error.count() == 0
    page.route("**/chat/completions", lambda route: route.abort())
    page.locator("#question").fill("more")
    page.keyboard.press("Enter")
    error.wait_for()
    assert error.text_content() == "The server cannot be reached."
    assert page.evaluate("turns.length") == 2


@in_browser
def test_a_key_is_asked_for_and_sent(another, tiny_store, open_page):
    with served(another, tiny_store, api_key="secret") as (server, _):
        page = open_page(server.url)
        page.locator("[role=alert]").wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("secret")
        page.keyboard.press("Tab")
        page.locator("#experts").wait_for()
        page.locator("#tokens").fill("4")
        ask(page, QUESTION, 1)


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_and_works_with_the_keyboard_alone(server, open_page, width, scheme):
    page = open_page(server.url, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.locator("#experts").wait_for()
    until(page, "document.activeElement.id === 'question'")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("twice")
    page.keyboard.press("Enter")
    page.locator(".assistant .note").wait_for()
    assert page.locator(".user p").text_content() == f"{QUESTION}\ntwice"
    reached = set()
    for _ in range(9):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached >= {"new", "log", "question", "send", "SUMMARY", "map"}
    page.locator("#map").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.locator("#cell").text_content().startswith("Layer 1, expert 1: ")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    inside = "id => { const box = document.getElementById(id).getBoundingClientRect();"
    inside += (
        " return box.left >= 0 && box.right <= innerWidth && box.top >= 0 && box.bottom <= innerHeight; }"
    )
    assert all(page.evaluate(inside, name) for name in ("question", "send", "map", "log"))
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 200) == (scheme == "dark")


@in_browser
def test_a_model_that_is_not_offloaded_has_no_map(tiny_store, open_page):
    resident = AutoModelForCausalLM.from_pretrained(resolve_model("tiny")).eval()
    with served(resident, tiny_store) as (server, _):
        page = open_page(server.url)
        set_up(page, tokens="4")
        ask(page, QUESTION, 1)
        assert page.locator("#experts").is_hidden()
        assert server.http.get("/experts").status_code == 404


# without a browser


def watching(server):
    """(the response, its events)."""
    return server.http.stream("GET", "/experts")


def events(lines):
    return (json.loads(line[6:]) for line in lines if line.startswith("data: "))


def test_the_page_is_closed_to_other_pages(server):
    answer = httpx.get(server.url, trust_env=False)
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "*" not in policy
    assert "innerHTML" not in answer.text and "http://" not in answer.text.replace("http://www.w3.org", "")


def test_events_tell_what_the_pager_did(server, model):
    pager = model.melinoe_paged.pager
    pager.reset()
    with watching(server) as answer:
        stream = events(answer.iter_lines())
        before = next(stream)
        sizes = [layer.num_experts for layer in pager.store.layers]
        assert [len(row) for row in before["layers"]] == sizes
        assert set("".join(before["layers"])) == {"."}
        body = {"model": "tiny", "prompt": QUESTION, "max_tokens": 8, "temperature": 0}
        assert server.http.post("/v1/completions", json=body).status_code == 200
        seen, last = set(), before
        while set("".join(last["layers"])) - set(".o") or last == before:
            last = next(stream)
            seen |= set("".join(last["layers"]))
    assert seen >= set("om")  # h too, unless a miss hides it
    held = [{expert for expert, mark in enumerate(row) if mark == "o"} for row in last["layers"]]
    assert held == pager.policy.resident
    counted = pager.statistics
    assert last["decode"]["hits"] == counted.decode_hits and last["decode"]["bytes"] == counted.decode_bytes
    assert last["decode"]["misses"] == counted.decode_loads
    assert last["prefill"]["misses"] == counted.prefill_loads
    assert last["slots"] == 4 * len(sizes)


def unwatched(pager):
    """Whether nobody listens, within a while: the end of a stream has to be noticed."""
    end = time.monotonic() + 5
    while pager.watcher is not None and time.monotonic() < end:
        time.sleep(0.01)
    return pager.watcher is None


def test_nobody_listens_to_the_pager_while_nobody_looks(server, model):
    pager = model.melinoe_paged.pager
    assert unwatched(pager)
    with watching(server) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        assert pager.watcher is not None
    assert unwatched(pager)


def test_only_so_many_watch_and_only_with_the_key(another, tiny_store):
    with served(another, tiny_store, api_key="secret") as (server, _):
        assert httpx.get(f"{server.url}/experts", trust_env=False).status_code == 401
        assert httpx.get(server.url, trust_env=False).status_code == 200
        many = [httpx.Client(base_url=server.url, headers=server.http.headers, trust_env=False)
                for _ in range(MOST_WATCHERS)]  # fmt: skip
        streams = [client.stream("GET", "/experts") for client in many]
        for stream in streams:
            assert stream.__enter__().status_code == 200
        refused = server.http.get("/experts")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "server_busy")
        for stream in streams:
            stream.__exit__(None, None, None)
        for client in many:
            client.close()


def test_who_looks_on_does_not_keep_the_server_from_leaving(tiny_store, tmp_path):
    server = ServerProcess("--model", str(tiny_store), "--slots", "4", log=tmp_path / "log")
    try:
        with watching(server) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            for _ in lines:
                pass  # until it ends, long before --drain is over
        assert server.process.wait(timeout=20) == 0
    finally:
        server.kill()
