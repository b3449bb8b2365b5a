"""The next token of one request: transformers' own processors, and a generator of its own.

What comes out depends on the request's tokens, logits, settings and seed, and on nothing of its neighbours
in a batch. It is what `model.generate` would do with the same settings after `torch.manual_seed(seed)`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from melinoe.runtime.generation_settings import AS_THE_CHECKPOINT, Sampling, of_one_answer


@dataclass(frozen=True)
class Choice:
    """A chosen token. Logarithms of probabilities are the model's own, before any setting changed them."""

    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = field(default=())


def sampler(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling = AS_THE_CHECKPOINT,
    *,
    seed: int | None = None,
    logprobs: int | None = None,
    ignore_eos: bool = False,
) -> Sampler:
    """For one request, which follows the checkpoint where it says nothing itself.

    Args:
        seed: None: a fresh one.
        logprobs: how many alternatives are reported; None: no logarithms at all.
        ignore_eos: no end token before `max_new_tokens`.

    Raises:
        MelinoeError: settings of the checkpoint that cannot be followed.
    """
    config = of_one_answer(model, tokenizer, max_new_tokens, sampling)
    config.max_length = len(prompt) + max_new_tokens
    if ignore_eos:
        config.min_new_tokens = max_new_tokens
    return Sampler(model, config, prompt, seed, logprobs)


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
        said = torch.tensor([prompt], device=device)
        model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=device, batch_size=1)
        self._processors = model._get_logits_processor(
            config, input_ids_seq_length=len(prompt), encoder_input_ids=said, device=device, model_kwargs={}
        )
        self._drawn = bool(config.do_sample)
        self.seed = _within_64_bits(seed) if seed is not None else secrets.randbits(63)
        self._generator: torch.Generator | None = None
        if self._drawn:
            self._generator = torch.Generator(device=device).manual_seed(self.seed)
        self._logprobs = logprobs
        self._length = len(prompt)
        self._ids = torch.empty((1, len(prompt) + config.max_new_tokens), dtype=torch.long, device=device)
        self._ids[0, : self._length] = said[0]

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
