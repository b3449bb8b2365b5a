"""Both engines on tiny models of many families: the tokens of `generate`, batched wherever it can be."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import melinoe
from families import save_checkpoint
from family_configs import config
from melinoe.runtime.answer_text import AnswerText
from melinoe.runtime.generation_settings import Sampling, end_tokens
from melinoe.serving.engine import batched, start
from melinoe.serving.engine.request import EngineRequest
from melinoe.serving.engine.sampling import sampler
from melinoe.serving.settings import ServeSettings

NEW_TOKENS = 12
NAMES = map(str, itertools.count())  # of requests; never used twice
LENGTHS = (5, 40, 21, 1, 40)  # the last prompt begins as the second


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(3, 50, (length,), generator=generator).tolist() for length in LENGTHS]
    made[-1][:33] = made[1][:33]
    return made


def answers(engine: Any, model: Any, tokenizer: Any, prompts: list[list[int]], **settings: Any) -> Any:
    """Tokens of all prompts, computed together; and how many tokens of each prompt were not computed."""
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    requests, ends = [], end_tokens(model.generation_config, tokenizer)
    for number, prompt in enumerate(prompts):
        chooser = sampler(
            model, tokenizer, prompt, NEW_TOKENS, Sampling(**settings), seed=number, ignore_eos=True
        )
        text = AnswerText(tokenizer, [])
        requests.append(EngineRequest(next(NAMES), prompt, chooser, text, NEW_TOKENS, ends, ended.put))
    for request in requests:
        engine.submit(request)
    left = len(requests)
    while left:
        progress = ended.get(timeout=60)
        if progress.error is not None:
            raise progress.error
        left -= progress.finish_reason is not None
    return [request.tokens for request in requests], [request.cached_tokens for request in requests]


def generated(model: Any, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    result = []
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    for number, prompt in enumerate(prompts):
        torch.manual_seed(number)
        with torch.no_grad():
            made = model.generate(torch.tensor([prompt]), pad_token_id=0, **length, **settings)
        result.append(made[0, len(prompt) :].tolist())
    return result


class NoTokenizer:
    """Engines need the text only."""

    added_tokens_decoder: dict[int, Any] = {}
    eos_token_id = pad_token_id = None

    def convert_ids_to_tokens(self, token):
        return str(token)

    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


# {family: fields that change how it attends}
BATCHED = {
    "olmoe": {},
    "mixtral": {"sliding_window": 8},
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {"sliding_window": 8},
    "glm4_moe": {},
    "phimoe": {"sliding_window": 8},  # windows of these two are in the mask alone
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "dots1": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "dbrx": {},
}
ALONE = ("deepseek_v3", "jamba", "qwen3_next", "llama4_text", "lfm2_moe")


@pytest.mark.parametrize("family", [*BATCHED, *ALONE])
def test_the_tokens_are_those_of_generate(family, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batched, "PREFILL_CHUNK", 16)  # prompts of 40 come in pieces
    torch.manual_seed(0)
    source = save_checkpoint(tmp_path / "model", family)
    changed = BATCHED.get(family)
    if changed:
        made = config(family)
        made.update(changed)
        AutoModelForCausalLM.from_config(made).save_pretrained(source)
    model = melinoe.load(source, slots=3)
    given = prompts()
    greedy = generated(model, given, do_sample=False)
    drawn = generated(model, given, do_sample=True, temperature=0.8, top_k=20)
    settings = ServeSettings(concurrency=3, context=64, cached_tokens=192)
    tokenizer = NoTokenizer()
    logged: list[logging.LogRecord] = []
    logger = logging.getLogger("ContinuousBatchingLogger")
    monkeypatch.setattr(logger, "handlers", [SimpleNamespace(level=0, handle=logged.append)])
    engine = start.start_engine(model, tokenizer, settings)
    try:
        assert not [one for one in logged if one.levelno >= logging.ERROR]  # the reason is one line
        assert not logger.disabled
        assert engine.name == ("batched" if family in BATCHED else "one at a time")
        assert ("because" in capsys.readouterr().err) == (family in ALONE)
        found, _ = answers(engine, model, tokenizer, given, temperature=0.0)
        assert found == greedy
        found, cached = answers(engine, model, tokenizer, given, temperature=0.8, top_k=20)
        assert found == drawn
        if family == "olmoe":
            assert cached[1] == 32 and cached[4] == 32  # whole blocks of 16, never the whole prompt
        end = time.monotonic() + 5
        while engine.cache_use > 0:  # the last answer is there a moment before its blocks are free
            assert time.monotonic() < end
    finally:
        engine.stop()
    assert generated(model, given[:2], do_sample=False) == greedy[:2]  # as it was before


def test_the_model_keeps_its_settings_while_it_answers(tmp_path):
    """Other requests read them meanwhile: end tokens, and how to draw."""
    model = melinoe.load(save_checkpoint(tmp_path / "model", "qwen3_next"), slots=3)
    expected, seen = model.generation_config.to_dict(), []

    class Looking:
        finished, name, prompt, max_new_tokens = False, "looking", [5, 6, 7], 4

        def advance(self, logits):
            seen.append(model.generation_config.to_dict())
            return 4

        def fail(self, error):
            raise error

    engine = start.OneAtATimeEngine(model, 64)
    engine._generate(Looking(), threading.Event())
    assert len(seen) == 4 and all(one == expected for one in seen)
