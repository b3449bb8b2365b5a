"""/v1/responses, with the real openai client: the same answers as chat completions, in other words."""

from __future__ import annotations

import openai
import pytest

import melinoe
from serving_process import served

QUESTION = "sort 3,1,2"
SETTINGS = {"model": "tiny", "temperature": 0.0}


@pytest.fixture(scope="module")
def client(tiny_store):
    with served(melinoe.load(tiny_store, slots=8), tiny_store, context=300) as (server, _):
        yield server.openai()


def chat(client, messages, length):
    answer = client.chat.completions.create(messages=messages, max_completion_tokens=length, **SETTINGS)
    return answer.choices[0]


@pytest.mark.parametrize("length", [4, 200])
def test_a_response_is_the_answer_of_a_chat(client, length):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    expected = chat(client, messages, length)
    asked = {"input": QUESTION, "instructions": "Be brief.", "max_output_tokens": length, **SETTINGS}
    found = client.responses.create(**asked)
    assert found.output_text == expected.message.content
    assert found.status == ("incomplete" if expected.finish_reason == "length" else "completed")
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == found.output_text
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", f"response.{found.status}",
    ]  # fmt: skip
    assert events[-1].response.output_text == found.output_text
    assert events[-1].response.usage.output_tokens == found.usage.output_tokens
    if found.status == "incomplete":
        return  # which the client's own reader of streams does not take for an end
    with client.responses.stream(**asked) as stream:
        list(stream)
        assert stream.get_final_response().output_text == found.output_text


def test_an_earlier_response_is_sent_back_as_it_is(client):
    asked = {"max_output_tokens": 8, **SETTINGS}
    first = client.responses.create(input=QUESTION, **asked)
    turns = [{"role": "user", "content": QUESTION}, first.output[0].model_dump(exclude_none=True)]
    turns.append({"role": "user", "content": [{"type": "input_text", "text": "and 9,8"}]})
    found = client.responses.create(input=turns, **asked)
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": first.output_text}]
    messages.append({"role": "user", "content": "and 9,8"})
    assert found.output_text == chat(client, messages, 8).message.content


@pytest.mark.parametrize(
    "wrong",
    [{"store": True}, {"previous_response_id": "x"}, {"tools": [{"type": "web_search"}]},
     {"max_output_tokens": 9999}, {"input": []}],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_its_name(client, wrong):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"input": QUESTION, **SETTINGS, **wrong})
    assert caught.value.param == next(iter(wrong))
