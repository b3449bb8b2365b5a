"""The next token of one request: transformers' own processors, and a generator of its own.

What comes out depends on the request's tokens, logits, settings and seed, and on nothing of its neighbours
in a batch. It is what `model.generate` would do with the same settings after `torch.manual_seed(seed)`.
"""

from __future__ import annotations

import copy
import secrets
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig


@dataclass(frozen=True)
class Choice:
    """A chosen token. Logarithms of probabilities are the model's own, before any setting changed them."""

    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = field(default=())


class Defaults:
    """The checkpoint's generation settings, filled up as `generate` does; requests change a copy.

    Args:
        model: whose generation_config holds.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config: GenerationConfig = model._prepare_generation_config(None)[0]
        # one answer at a time, one token at a time, whatever the checkpoint prefers
        self.config.num_beams = self.config.num_return_sequences = 1
        self.stop_strings = list(self.config.stop_strings or [])

    @property
    def end_tokens(self) -> list[int]:
        ends = self.config.eos_token_id
        return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [int(ends)]

    def sampler(
        self,
        prompt: list[int],
        max_new_tokens: int,
        seed: int | None = None,
        logprobs: int | None = None,
        ignore_eos: bool = False,
        **settings: Any,
    ) -> Sampler:
        """For one request.

        Args:
            settings: fields of GenerationConfig; None: the checkpoint's. temperature 0 is greedy.
            seed: None: a fresh one.
            logprobs: how many alternatives are reported; None: no logarithms at all.
            ignore_eos: no end token before `max_new_tokens`.
        """
        config = copy.deepcopy(self.config)
        given = {name: value for name, value in settings.items() if value is not None}
        temperature = given.pop("temperature", None)
        if temperature is not None:
            config.do_sample = temperature > 0
        elif given.keys() & {"top_p", "top_k", "min_p"}:
            config.do_sample = True  # nobody narrows down what is not drawn
        if temperature:
            config.temperature = temperature
        config.update(**{**given, "top_k": max(given["top_k"], 0)} if "top_k" in given else given)
        config.max_new_tokens, config.max_length = max_new_tokens, len(prompt) + max_new_tokens
        if ignore_eos:
            config.min_new_tokens = max_new_tokens
        return Sampler(self.model, config, prompt, seed, logprobs)


class Sampler:
    """Chooses the tokens of one request, one call each.

    Args:
        model: whose processors are built (`_get_logits_processor`, as in `generate`).
        config: with every setting of the request in it.
        prompt: token ids.
    """

    def __init__(
        self, model: Any, config: GenerationConfig, prompt: list[int], seed: int | None, logprobs: int | None
    ) -> None:
        device = model.device
        model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=device, batch_size=1)
        self._processors = model._get_logits_processor(
            config, input_ids_seq_length=len(prompt), device=device, model_kwargs={}
        )
        self._drawn = bool(config.do_sample)
        self.seed = _within_64_bits(seed) if seed is not None else secrets.randbits(63)
        self._generator: torch.Generator | None = None
        if self._drawn:
            self._generator = torch.Generator(device=device).manual_seed(self.seed)
        self._logprobs = logprobs
        self._length = len(prompt)
        self._ids = torch.empty((1, len(prompt) + config.max_new_tokens), dtype=torch.long, device=device)
        self._ids[0, : self._length] = torch.tensor(prompt)

    def choose(self, logits: torch.Tensor) -> Choice:
        """logits: [V] float32 behind the last token. The chosen token counts as said."""
        scores = self._processors(self._ids[:, : self._length], logits[None].clone())  # [1, V]
        if self._drawn:
            shares = torch.nn.functional.softmax(scores, dim=-1)
            token = int(torch.multinomial(shares, num_samples=1, generator=self._generator))
        else:
            token = int(torch.argmax(scores, dim=-1))
        self._ids[0, self._length] = token
        self._length += 1
        if self._logprobs is None:
            return Choice(token)
        own = torch.log_softmax(logits, dim=-1)
        best = own.topk(min(self._logprobs, len(own))) if self._logprobs else None
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best is not None else ()
        return Choice(token, float(own[token]), tuple(pairs))


def _within_64_bits(seed: int) -> int:
    """What torch takes as it is; any other number folded."""
    return seed if -(2**63) <= seed < 2**64 else seed % 2**63
