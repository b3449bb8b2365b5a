"""Rows to tokens: those of the chat template, of the tokenizer, and of nobody else; and where answers are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_tokenizers import CHATML, ENDS, KINDS, LLAMA, MARKED, PHI, end_token, tokenizer, unmarked
from melinoe.data.columns import parse_row
from melinoe.data.encoding import encode, encode_prompt, encode_rows
from melinoe.data.rows import Row
from melinoe.errors import MelinoeError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


HELLO = Row((user("hello"),), "yo")
TURNS = Row((user("hello"), assistant("yes"), user("what")), "yo")


def said(of, encoded):
    """The texts of the answers."""
    return [of.decode(encoded.ids[start:end]) for start, end in encoded.answers]


# ------------------------------------------------------------------ with a chat template


@pytest.mark.parametrize("marked", [False, True], ids=["unmarked", "marked"])
@pytest.mark.parametrize("layout", MARKED)
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_as_its_template_ends_it(kind, layout, marked):
    template = MARKED[layout] if marked else unmarked(MARKED[layout])
    words = tokenizer(kind, True, False, template)
    ends = [end_token(words, layout)]
    for row, answers in ((HELLO, ["yo"]), (TURNS, ["yes", "yo"])):
        encoded = encode(words, row, end_tokens=ends)
        assert encoded.ids == words.apply_chat_template(row.conversation)["input_ids"]
        assert said(words, encoded) == [answer + ENDS[layout] for answer in answers]
        asked = encode_prompt(words, row)
        assert asked == words.apply_chat_template(list(row.messages), add_generation_prompt=True)["input_ids"]
        assert encoded.ids[: encoded.answers[-1][0]] == asked
    last = encode(words, TURNS, end_tokens=ends, last_turn_only=True)
    assert said(words, last) == ["yo" + ENDS[layout]] and last.ids == encoded.ids


def test_what_follows_the_end_is_no_part_of_the_answer():
    """Phi's template writes <|endoftext|> behind the conversation, which no generation reaches."""
    words = tokenizer("byte level", False, False, PHI)
    ends = [words.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|end|>")]
    encoded = encode(words, HELLO, end_tokens=ends)
    assert words.decode(encoded.ids).endswith("yo<|end|><|endoftext|>")
    assert said(words, encoded) == ["yo<|end|>"]
    assert encoded.end < len(encoded.ids)
    unknown = encode(words, HELLO)  # where nobody says what ends a generation: all that the template writes
    assert unknown.answers[0][0] == encoded.answers[0][0]


def test_an_end_outside_of_the_marks_is_learned_too():
    """Else a model would never learn to stop."""
    outside = CHATML.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    words = tokenizer("byte level", False, False, outside)
    assert said(words, encode(words, TURNS, end_tokens=[end_token(words, "chatml")])) == [
        "yes<|im_end|>",
        "yo<|im_end|>",
    ]


THINKING = """{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\
{% if not loop.last and '</think>' in m.content %}{{ m.content.split('</think>')[1] }}\
{% else %}{{ m.content }}{% endif %}</s>{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|><think>{% endif %}"""
TOOLS_LAST = """{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% else %}\
{% if loop.last or (loop.index == messages | length - 1) %}<|system|>rules {% endif %}\
[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"""


def test_a_prompt_that_begins_the_answer():
    """DeepSeek's template opens <think> for a generation, and drops the thoughts of earlier turns."""
    words = tokenizer("byte level", False, False, THINKING)
    row = Row((user("hello"), assistant("<think>hm</think>yes"), user("what")), "<think>so</think>yo")
    assert said(words, encode(words, row)) == ["yes</s>", "so</think>yo</s>"]
    assert said(words, encode(words, TURNS)) == ["yes</s>", "yo</s>"]


def test_a_template_that_writes_earlier_turns_otherwise():
    """Mistral's puts the rules before the last user message, wherever that is."""
    words = tokenizer("byte level", False, False, TOOLS_LAST)
    encoded = encode(words, TURNS)
    assert words.decode(encoded.ids) == "[INST]hello[/INST]yes</s><|system|>rules [INST]what[/INST]yo</s>"
    assert said(words, encoded) == ["yes</s>", "yo</s>"]


def test_answers_that_are_given_or_say_nothing():
    words = tokenizer("byte level", False, False, CHATML)
    ends = [end_token(words, "chatml")]
    given = parse_row({"prompt": list(TURNS.messages), "completion": [assistant("yo")]}, "f, line 1")
    assert said(words, encode(words, given, end_tokens=ends)) == ["yo<|im_end|>"]
    weighed = [user("hello"), assistant("yes") | {"weight": 0}, user("what"), assistant("yo") | {"weight": 1}]
    row = parse_row({"messages": weighed}, "f, line 1")
    assert said(words, encode(words, row, end_tokens=ends)) == ["yo<|im_end|>"]
    silent = Row((user("hello"), assistant(" "), user("what")), "yo")
    assert said(words, encode(words, silent, end_tokens=ends)) == ["yo<|im_end|>"]
    assert encode(words, Row((user("hello"),), "")) is None
    first = parse_row({"messages": [assistant("yo"), user("hello"), assistant("yes")]}, "f, line 1")
    assert said(words, encode(words, first, end_tokens=ends)) == ["yo<|im_end|>", "yes<|im_end|>"]


CALLS = CHATML.replace(
    "{% generation %}",
    "{% generation %}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}",
)
TOOLS = "{% if tools %}<|system|>{{ tools | tojson }}{% endif %}" + CALLS
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
CALL = {"function": {"name": "clock", "arguments": '{"zone": "utc"}'}}
ASKED = [user("what time"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]


def test_tools_and_calls_reach_the_template():
    row = parse_row({"messages": ASKED, "tools": [TOOL]}, "f, line 1")
    words = tokenizer("byte level", False, False, TOOLS)
    encoded = encode(words, row, end_tokens=[end_token(words, "chatml")])
    call = '<call>{"name": "clock", "arguments": {"zone": "utc"}}</call>'  # an object, not text in quotes
    assert said(words, encoded) == [call + "<|im_end|>"]
    assert '"name": "clock", "parameters"' in words.decode(encoded.ids[: encoded.prompt_length])
    assert encode_prompt(words, row) == encoded.ids[: encoded.prompt_length]


@pytest.mark.parametrize(
    ("template", "lost"), [(CALLS, "tools"), (CHATML, "tool calls"), (None, "need a chat template")]
)
def test_what_a_template_does_not_write_is_refused(template, lost):
    row = parse_row({"messages": ASKED, "tools": [TOOL]}, "rows.jsonl, line 7")
    with pytest.raises(MelinoeError, match=rf"rows.jsonl, line 7: .*{lost}"):
        encode(tokenizer("byte level", False, False, template), row)


def test_a_system_message_that_is_dropped_or_refused_is_named():
    row = parse_row({"system": "be brief", "prompt": "hello", "completion": "yo"}, "rows.jsonl, line 3")
    deaf = "{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}"
    with pytest.raises(MelinoeError, match=r"line 3: the chat template does not write system messages"):
        encode(tokenizer("byte level", False, False, deaf), row)
    with pytest.raises(MelinoeError, match=r"does not write system messages"):
        encode_prompt(tokenizer("byte level", False, False, deaf), row.messages)
    with pytest.raises(MelinoeError, match=r"line 3: the chat template refuses .*System role not supported"):
        encode(tokenizer("byte level", False, False, MARKED["gemma"]), row)
    words = tokenizer("byte level", False, False, LLAMA)
    assert "be brief" in words.decode(encode(words, row).ids)


# ------------------------------------------------------------------ without one


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (True, True), (False, True)])
def test_prompt_and_answer_are_one_text(kind, bos, eos):
    words = tokenizer(kind, bos, eos)
    row = Row((user("2+2="),), "4")
    encoded = encode(words, row)
    whole = words("2+2=4")["input_ids"]
    assert encoded.ids == whole if eos else encoded.ids == [*whole, words.eos_token_id]
    assert encoded.end == len(encoded.ids)
    assert "4" in said(words, encoded)[0] and " 4" not in said(words, encoded)[0]
    assert "4" not in words.decode(encoded.ids[: encoded.prompt_length])
    asked = encode_prompt(words, "2+2=")
    assert asked[-1] != words.eos_token_id and (asked[0] == words.bos_token_id) == bos
    assert encode_prompt(words, row, raw=True) == asked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (True, True)])
def test_the_first_word_of_a_text_is_scored_where_something_stands_before_it(kind, bos, eos):
    words = tokenizer(kind, bos, eos)
    encoded = encode(words, Row((), "yo world"))
    ids = words("yo world")["input_ids"]
    assert encoded.ids == (ids if eos else [*ids, words.eos_token_id])
    assert encoded.answers == ((1, len(encoded.ids)),)
    assert (said(words, encoded)[0].strip() == "yo world</s>") == bos


# ------------------------------------------------------------------ what is left out


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize(
    ("half", "named"), [("\udcff", "byte 0xff"), ("\ud83d", r"\\ud83d")], ids=["byte", "json"]
)
def test_half_of_a_surrogate_pair_is_named(template, half, named):
    tokens = tokenizer("byte level", False, False, template)
    for row in (
        {"prompt": "a" + half, "completion": "b"},
        {"prompt": "a", "completion": half},
        {"messages": [{"role": "user", "content": half}, {"role": "assistant", "content": "b"}]},
        {"text": "a" + half},
    ):
        with pytest.raises(MelinoeError, match=f"is not UTF-8; got {named}"):
            encode(tokens, parse_row(row, "rows.jsonl, line 1"))
    for raw in (False, True):
        with pytest.raises(MelinoeError, match=f"the prompt is not UTF-8; got {named} behind 'a'"):
            encode_prompt(tokens, "a" + half, raw=raw)


def test_rows_left_out_are_counted_by_reason():
    words = tokenizer()
    rows = [HELLO, Row((user("hello"),), "what " * 30), Row((user("hello"),), " "), HELLO]
    found = encode_rows(words, rows, 12)
    assert len(found.rows) == len(found.encoded) == 2
    assert str(found) == "2 of 4 rows left out: 1 over 12 tokens, 1 with an empty answer"
    assert found.to_json() == {
        "num_rows_left_out": 2,
        "left_out": {"too_long": 1, "empty": 1},
        "max_length": 12,
    }
    assert str(encode_rows(words, [HELLO])) == ""
    with pytest.raises(MelinoeError, match=r"2 of 2 rows left out: 2 over 3 tokens; raise --max-length"):
        encode_rows(words, [HELLO, HELLO], 3)
    with pytest.raises(MelinoeError, match=r"1 of 1 rows left out: 1 with an empty answer$"):
        encode_rows(words, rows[2:3])


# ------------------------------------------------------------------ anything, compared with transformers

contents = st.text(st.sampled_from("yo he12+=. \n\téß你😀<|"), min_size=1, max_size=12)
conversations = st.lists(st.tuples(contents, contents), min_size=1, max_size=3)


@settings(max_examples=70, deadline=None)
@given(st.sampled_from(KINDS[:3]), st.sampled_from(sorted(MARKED)), conversations)
def test_answers_are_where_transformers_finds_them(kind, layout, turns):
    """The mask that transformers makes of marks, against what is found where there are none."""
    messages = [message for one, other in turns for message in (user(one), assistant(other))]
    row = Row(tuple(messages[:-1]), messages[-1]["content"])
    marked, plain = (
        tokenizer(kind, True, False, template) for template in (MARKED[layout], unmarked(MARKED[layout]))
    )
    ends = [end_token(plain, layout)]
    expected = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    for words in (marked, plain):
        encoded = encode(words, row, end_tokens=ends)
        if not any(answer.strip() for _, answer in turns):
            assert encoded is None
            continue
        assert encoded.ids == expected["input_ids"]
        mask = [0] * len(encoded.ids)
        for start, end in encoded.answers:
            mask[start:end] = [1] * (end - start)
        silent = [not answer.strip() for _, answer in turns]
        if not any(silent):
            assert mask == expected["assistant_masks"]
        assert len(encoded.answers) == len(turns) - sum(silent)
    if encoded is not None:
        assert (
            encode_prompt(plain, row)
            == (plain.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"])
        )


@settings(max_examples=70, deadline=None)
@given(st.sampled_from(KINDS), st.booleans(), st.booleans(), contents, contents)
def test_a_seam_is_where_the_text_has_it(kind, bos, eos, prompt, answer):
    """Without a template: the tokens of the whole text, parted before the first with a bit of the answer."""
    words = tokenizer(kind, bos, eos)
    encoded = encode(words, Row((user(prompt),), answer))
    if not answer.strip():
        assert encoded is None
        return
    whole = words(prompt + answer)["input_ids"]
    assert encoded.ids == (whole if eos else [*whole, words.eos_token_id])
    ((start, end),) = encoded.answers
    assert 1 <= start < end == len(encoded.ids)
    if words.is_fast:
        places = words(prompt + answer, return_offsets_mapping=True)["offset_mapping"]
        assert all(stop <= len(prompt) for _, stop in places[:start]) or start == 1
        assert places[start][1] > len(prompt) or places[start] == (0, 0)  # or the end token
    text = encode(words, Row((), answer))
    ids = words(answer)["input_ids"]
    assert text.ids == (ids if eos else [*ids, words.eos_token_id])
