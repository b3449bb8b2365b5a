"""`melinoe serve --replicas 2` on Ray Serve: both answer, a killed one is replaced, no answer is lost."""

from __future__ import annotations

import contextlib
import signal
import threading
import time

import psutil
import pytest
from typer.testing import CliRunner

import melinoe
from melinoe.cli.main import app
from melinoe.runtime.load import load_tokenizer
from serving_process import ServerProcess

QUESTION = "sort 3,1,2"


def replicas(server):
    """The processes of the replicas that are there now."""
    there = set()
    for one in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may end while it is looked at
            there |= {one.pid} if "ServeReplica" in " ".join(one.cmdline()) else set()
    return there


def until(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_both_answer_and_a_killed_one_is_replaced(tiny_store, tmp_path):
    pytest.importorskip("ray")
    model, tokenizer = melinoe.load(tiny_store, slots=8), load_tokenizer(tiny_store)
    expected, _ = melinoe.generate(model, tokenizer, QUESTION, max_new_tokens=12, temperature=0.0)
    options = ["--model", str(tiny_store), "--slots", "8", "--served-model-name", "tiny", "--replicas", "2"]
    server = ServerProcess(*options, log=tmp_path / "log")
    said, over = [], threading.Event()

    def client():
        speaker = server.openai().with_options(max_retries=5)
        while not over.is_set():
            answer = speaker.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": QUESTION}], max_tokens=12, temperature=0
            )
            said.append(answer.choices[0].message.content)

    def answering():
        """How long the replica that answers took to load, to the last digit: it tells them apart."""
        return server.metric("melinoe_model_load_seconds")

    clients = [threading.Thread(target=client, daemon=True) for _ in range(4)]
    try:
        first, seen = replicas(server), set()
        assert len(first) == 2
        until(lambda: seen.add(answering()) or len(seen) == 2)
        for one in clients:
            one.start()
        until(lambda: len(said) > 8)
        psutil.Process(min(first)).kill()
        until(lambda: len(replicas(server) - {min(first)}) == 2)
        new = set()
        until(lambda: new.add(answering()) or len(new | seen) == 3)
        before = len(said)
        until(lambda: len(said) > before + 8)
        over.set()
        for one in clients:
            one.join(timeout=60)
            assert not one.is_alive()
        assert set(said) == {expected}
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
    finally:
        over.set()
        server.kill()


def test_without_ray_the_extra_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ray" else name)
    said = CliRunner().invoke(app, ["serve", "--model", "nowhere", "--replicas", "2"])
    assert said.exit_code == 1 and "pip install 'melinoe-moe[ray]'" in said.stderr
