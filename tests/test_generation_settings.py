"""What a checkpoint says about generating holds in `generate`: compared with transformers' own generate."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig

from chat_tokenizers import tokenizer as chat_tokenizer
from melinoe.data.encoding import encode_prompt
from melinoe.errors import MelinoeError
from melinoe.runtime.generation import generate, stream_generate
from melinoe.runtime.generation_settings import end_tokens, folder_settings, request
from text_model import model_and_tokenizer, save

PROMPT = "say abc"


@pytest.fixture
def model():
    return copy.deepcopy(model_and_tokenizer()[0])


def own(model, words, **settings):
    """The text that transformers generates with the model's settings and these."""
    ids = torch.tensor([encode_prompt(words, PROMPT)])
    torch.manual_seed(3)
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, pad_token_id=0, **settings
    )
    return words.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


def ours(model, words, **settings):
    return generate(model, words, PROMPT, max_new_tokens=12, seed=3, **settings)[0]


SETTINGS = {
    "nothing": {},
    "several ends": {"eos_token_id": [2, 7, 9, 11, 13, 15]},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 5},
    "stop strings": {"stop_strings": ["a", "e", "m"]},
    "beams": {"num_beams": 3},
    "beams that draw": {"num_beams": 2, "do_sample": True},
    "no repetition": {"repetition_penalty": 1.8},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_checkpoint_says_holds(model, name):
    words = model_and_tokenizer()[1]
    model.generation_config.update(**SETTINGS[name])
    settings = {"tokenizer": words} if "stop_strings" in SETTINGS[name] else {}
    if "return_dict_in_generate" in SETTINGS[name]:
        settings["return_dict_in_generate"] = False
    assert ours(model, words) == own(model, words, **settings)


def test_a_temperature_wins_over_the_checkpoint(model):
    words = model_and_tokenizer()[1]
    plain = own(model, words, do_sample=False)
    model.generation_config.update(do_sample=True, temperature=1.5)
    assert ours(model, words, temperature=0.0) == plain
    assert ours(model, words, temperature=0.7) == own(model, words, temperature=0.7)
    assert ours(model, words, temperature=1e-308) == plain  # whose limit that is
    assert ours(model, words, temperature=1e-5) == plain


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.2, "top_p": 0.7}, {"top_k": 4}, {"min_p": 0.1}, {"repetition_penalty": 2.0}],
    ids=" ".join,
)
def test_what_is_asked_for_is_what_transformers_does(model, settings):
    words = model_and_tokenizer()[1]
    drawn = settings.keys() != {"repetition_penalty"}
    assert ours(model, words, **settings) == own(model, words, do_sample=drawn, **settings)
    assert ours(model, words, **settings) != ours(model, words)
    greedy = ours(model, words, **{**settings, "temperature": 0.0})
    assert (greedy == ours(model, words)) == drawn


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"])
def test_what_cannot_be_asked_for_is_refused_by_name(model, name):
    with pytest.raises(MelinoeError, match=name):
        ours(model, model_and_tokenizer()[1], **{name: -1})


def test_text_ends_before_a_stop_string(model):
    words = model_and_tokenizer()[1]
    whole = ours(model, words)
    stop = whole[4:6]
    pieces = list(stream_generate(model, words, PROMPT, max_new_tokens=12, stop=(stop, "never")))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].statistics.generated_tokens < 12
    with pytest.raises(MelinoeError, match="empty"):
        ours(model, words, stop=("",))


def test_several_answers_are_one_and_it_is_said(model):
    words = model_and_tokenizer()[1]
    model.generation_config.update(num_return_sequences=3, num_beams=3)
    asked = request(model, words, 12)
    assert asked.overridden == ("one answer, where the checkpoint asks for 3",)
    assert ours(model, words) == own(model, words, num_return_sequences=1)


def test_measurements_go_on_for_exactly_so_many_tokens(model):
    words = model_and_tokenizer()[1]
    free = [piece.token for piece in stream_generate(model, words, PROMPT, max_new_tokens=9)][:-1]
    model.generation_config.update(
        eos_token_id=[2, free[2]], stop_strings=["a", "e"], num_beams=2, do_sample=True
    )
    settings = {"max_new_tokens": 9, "ignore_eos": True}
    tokens = [piece.token for piece in stream_generate(model, words, PROMPT, **settings)][:-1]
    assert len(tokens) == 9 and tokens[:2] == free[:2] and free[2] not in tokens


def test_what_transformers_no_longer_does_is_refused_in_one_line(model):
    words = model_and_tokenizer()[1]
    model.generation_config.update(penalty_alpha=0.6, top_k=4)
    with pytest.raises(MelinoeError, match=r"cannot be followed; got contrastive search .*allowed: greedy"):
        ours(model, words)


def test_the_settings_of_a_folder_are_those_of_its_model(tmp_path):
    model, words = model_and_tokenizer()
    folder = save(tmp_path / "model")
    assert end_tokens(folder_settings(folder), words) == [2]
    GenerationConfig(eos_token_id=[2, 5]).save_pretrained(folder)
    assert end_tokens(folder_settings(folder), words) == [2, 5]
    (folder / "generation_config.json").unlink()
    assert end_tokens(folder_settings(folder), words) == [2] == end_tokens(model.generation_config, words)
    nothing = GenerationConfig()
    assert end_tokens(nothing, words) == [words.eos_token_id]


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "in Python"])
def test_streamed_text_is_the_tokenizers_own(model, kind):
    """With a tokenizer of every kind on the same model, whose tokens are then often no whole characters."""
    words = chat_tokenizer(kind)
    pieces = list(stream_generate(model, words, [5, 6, 7], max_new_tokens=40, temperature=5.0, seed=1))
    tokens = [piece.token for piece in pieces if piece.token is not None]
    assert "".join(piece.text for piece in pieces) == words.decode(tokens, skip_special_tokens=True)
    assert pieces[-1].statistics.generated_tokens == len(tokens)
