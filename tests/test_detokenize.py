"""Streamed text: the pieces joined are what the tokenizer makes of all tokens at once."""

from __future__ import annotations

import random

import pytest

from melinoe.models.folder import resolve_model
from melinoe.runtime.detokenize import WINDOW, Detokenizer
from melinoe.runtime.load import load_tokenizer
from tokenizers_of_all_kinds import KINDS

CHARACTERS = ["你", "é", "😀", "a"]


def sequences(tokenizer, number=60):
    """Random tokens, and random beginnings of characters where a byte is a token."""
    generator = random.Random(0)
    first_byte = tokenizer.convert_tokens_to_ids("<0x00>")
    for index in range(number):
        tokens = []
        while len(tokens) < generator.choice([3, 10, WINDOW // 2, 2 * WINDOW, 4 * WINDOW]):
            character = generator.choice(CHARACTERS).encode()[: generator.randint(1, 4)]
            if index % 2 and first_byte is not None and generator.random() < 0.5:
                tokens += [first_byte + byte for byte in character]
            else:
                tokens.append(generator.randrange(len(tokenizer)))
        yield tokens


def check(tokenizer):
    for tokens in sequences(tokenizer):
        stream = Detokenizer(tokenizer)
        pieces = [stream.add(token) for token in tokens]
        expected = tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(pieces) + stream.finish() == expected
        assert expected.startswith("".join(pieces))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_whole(kind):
    check(KINDS[kind]())


def test_pieces_of_the_embedded_model():
    check(load_tokenizer(resolve_model("tiny")))


def test_most_tokens_show_their_text_at_once():
    tokenizer = load_tokenizer(resolve_model("tiny"))
    tokens = tokenizer("What is 12 plus 7? Say it in words, please.")["input_ids"]
    stream = Detokenizer(tokenizer)
    assert sum(bool(stream.add(token)) for token in tokens) > 0.9 * len(tokens)
