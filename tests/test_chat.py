"""`melinoe chat`: a real process that is typed to, through a pipe and through a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import melinoe
from melinoe.cli.chat import command, talk
from melinoe.cli.main import app
from melinoe.data.rows import read_rows
from melinoe.errors import MelinoeError
from melinoe.runtime.generation_settings import Sampling
from melinoe.runtime.load import load_tokenizer
from melinoe.serving.conversation import Conversation, TurnStatistics
from melinoe.serving.engine.batched import PAGE_TOKENS
from melinoe.serving.engine.start import start_engine
from melinoe.serving.settings import ServeSettings

QUESTION = "sort 31,58,18,72"
COMMAND = [sys.executable, "-m", "melinoe", "chat", "--model", "tiny", "--slots", "8", "--temperature", "0"]


@pytest.fixture(scope="module")
def conversation():
    model = melinoe.load("tiny", slots=8)
    tokenizer = load_tokenizer("tiny")
    settings = ServeSettings(concurrency=1)
    engine = start_engine(model, tokenizer, settings)
    yield Conversation(model, tokenizer, engine, sampling=Sampling(temperature=0.0), max_new_tokens=48)
    engine.stop()


@pytest.fixture(autouse=True)
def empty(request):
    if "conversation" in request.fixturenames:
        request.getfixturevalue("conversation").clear()


def test_first_turn_is_what_generate_answers(conversation):
    text = "".join(conversation.ask(QUESTION))
    model, tokenizer = melinoe.load("tiny", slots=8), load_tokenizer("tiny")
    expected, _ = melinoe.generate(model, tokenizer, QUESTION, max_new_tokens=48, temperature=0.0)
    assert text == expected
    assert conversation.messages == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": text},
    ]


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_generate_takes_what_chat_takes(conversation, stream):
    conversation.system = "Be brief."
    try:
        whole = "".join(conversation.ask(QUESTION))
    finally:
        conversation.system = ""
    stop = whole[6:8]
    options = [
        "--system",
        "Be brief.",
        "--stop",
        stop,
        "--temperature",
        "0",
        "--top-k",
        "3",
        "--top-p",
        "0.9",
    ]
    options += ["--min-p", "0.1", "--repetition-penalty", "1", "--max-new-tokens", "48", stream]
    said = CliRunner().invoke(app, ["generate", "--model", "tiny", "--slots", "8", "-p", QUESTION, *options])
    assert said.exit_code == 0, said.stderr
    assert said.stdout == whole[: whole.index(stop)] + "\n"
    refused = CliRunner().invoke(app, ["generate", "--model", "tiny", "-p", "hi", "--system", "x", "--raw"])
    assert refused.exit_code == 1 and "--system needs the chat template" in refused.stderr


def test_earlier_turns_are_not_computed_again(conversation):
    list(conversation.ask(QUESTION))
    list(conversation.ask("sort 5,3"))
    found = conversation.statistics
    assert found.prompt_tokens > found.cached_tokens >= 3 * PAGE_TOKENS  # of 14 + 48 tokens, whole pages
    assert found.hits is not None and "hit rate" in str(found)


def test_an_answer_that_is_stopped_stays_as_far_as_it_was_said(conversation):
    pieces = conversation.ask(QUESTION)
    said = next(pieces)
    pieces.close()
    assert conversation.turns[-1] == {"role": "assistant", "content": said}
    assert "".join(conversation.ask(QUESTION))  # the engine is free again


def test_an_answer_that_was_stopped_before_its_first_token_has_no_speed():
    """It was said to have had `-0.1 tok/s`, a first token at once, and all of its prompt from before."""
    none = TurnStatistics(892, 892, 0, 0.0, 12.0)
    assert str(none) == "prompt 892 tokens | stopped after 12.00 s, before a token"
    assert "answer 1 tokens" in str(TurnStatistics(5, 0, 1, 0.5, 0.75)).split(" | ")
    assert "answer 3 tokens, 8.00 tok/s" in str(TurnStatistics(5, 0, 3, 0.5, 0.75)).split(" | ")


def test_a_question_that_the_engine_could_not_answer_is_forgotten(conversation):
    def broken(_logits):
        raise RuntimeError("the sampler is broken")

    request = conversation._request
    conversation._request = lambda arrived: _with_sampler(request(arrived), broken)
    try:
        with pytest.raises(MelinoeError, match="cannot go on; got the sampler is broken"):
            list(conversation.ask(QUESTION))
    finally:
        conversation._request = request
    assert conversation.turns == []


def _with_sampler(request, choose):
    request.sampler.choose = choose
    return request


def test_a_conversation_that_does_not_fit_is_refused_and_forgotten(conversation):
    with pytest.raises(MelinoeError, match="longer than the context"):
        next(conversation.ask("1," * 4000))
    assert conversation.turns == []


def test_commands(conversation, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    with pytest.raises(MelinoeError, match="nothing was said"):
        command(conversation, f"/save {file}")
    answer = "".join(conversation.ask(QUESTION))
    assert command(conversation, f"/save {file}")
    [row] = read_rows(file)
    assert row.completion == answer
    assert command(conversation, "/stats")
    assert "first token after" in capsys.readouterr().err
    assert command(conversation, "/clear")
    assert conversation.turns == []
    list(conversation.ask(QUESTION))
    with pytest.raises(MelinoeError, match="cannot write"):
        command(conversation, f"/save {tmp_path}")
    with pytest.raises(MelinoeError, match="unknown command /nonsense"):
        command(conversation, "/nonsense")
    assert not command(conversation, "/exit")


def _until(descriptor: int, wanted: str, seconds: float = 120) -> str:
    text, end = "", time.monotonic() + seconds
    while wanted not in text and time.monotonic() < end:
        if select.select([descriptor], [], [], 0.2)[0]:
            text += os.read(descriptor, 4096).decode(errors="replace")
    assert wanted in text, text
    return text


def test_a_note_stops_an_answer(conversation):
    """What Ctrl-C leaves in `chat`: no exception that could come in the middle of what ends an answer."""
    said = []
    for piece in conversation.ask(QUESTION, stopped=lambda: bool(said)):
        said.append(piece)
    assert len(said) == 1 and conversation.turns[-1] == {"role": "assistant", "content": said[0]}
    assert list(conversation.ask(QUESTION, stopped=lambda: True)) == []
    assert conversation.turns[-1]["role"] == "assistant"  # a question without an answer is forgotten
    assert conversation._engine._requests == {}
    assert "".join(conversation.ask(QUESTION))


def test_ctrl_c_pressed_again_ends_the_same_answer_and_nothing_else(conversation, monkeypatch):
    """As an exception the second one came into what ended the answer, which was then never cancelled."""
    engine, pressed = conversation._engine, []
    advance, cancel = engine._advance, engine.cancel

    def press(when):
        pressed.append(when)
        os.kill(os.getpid(), signal.SIGINT)

    def advancing(request, logits):
        if len(request.tokens) == 3 and not pressed:
            press("answering")
        return advance(request, logits)

    def cancelling(request):
        press("ending")
        cancel(request)

    typed = iter([QUESTION])
    monkeypatch.setattr(engine, "_advance", advancing)
    monkeypatch.setattr(engine, "cancel", cancelling)
    monkeypatch.setattr("builtins.input", lambda _: next(typed, None) or _end_of_file())
    try:
        talk(conversation)
    except KeyboardInterrupt:
        pytest.fail("it ended the program")
    assert pressed == ["answering", "ending"]
    assert engine._requests == {} and conversation.turns[-1]["role"] == "assistant"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _end_of_file():
    raise EOFError


def test_ctrl_c_stops_an_answer_and_not_the_program():
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        COMMAND, stdin=follower, stdout=follower, stderr=follower, start_new_session=True
    )
    os.close(follower)
    try:
        _until(leader, "> ")
        os.write(leader, f"{QUESTION}\n".encode())
        _until(leader, "take")
        process.send_signal(signal.SIGINT)
        _until(leader, "> ")
        os.write(leader, b"/system be kind\n")
        _until(leader, "system: be kind")
        os.write(leader, b"/exit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(leader)
