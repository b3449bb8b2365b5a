"""What a model whose experts are paged carries: its pager, and what the pager is told of each forward pass.

The experts function sees a flat list of tokens. A hook on the model that `generate` calls sees the
attention mask and the cache, and notes for all layers of the same pass which tokens are real, how old they
are, and whether it is prefill or decoding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from melinoe.errors import MelinoeError
from melinoe.machine import return_holes
from melinoe.models.forward_inputs import given_tokens, input_ids, past_length, real_tokens
from melinoe.models.token_ids import refuse_unknown_ids
from melinoe.paging.pager import ExpertPager
from melinoe.prediction.predictor import Prediction, Predictor, mean_prediction
from melinoe.routing.policies import DECODE, PREFILL, Call
from melinoe.store.stored_identity import stored_identity

MANY_TOKENS = 512  # of a pass, from which on what it takes is worth giving back
RETURN_LAYERS = 4  # of such a pass, after which it is given back once more


class _Note(threading.local):
    """What the layers know of the calling thread's forward pass; see `Call` for ages and valid."""

    phase = PREFILL
    ages: np.ndarray = np.empty(0, np.int64)
    valid: np.ndarray = np.empty(0, bool)
    decoding: np.ndarray | None = None


# of a pass of one token: [1, 1] and [1] real, [1] the last of its sequence; read only
_ONE, _REAL, _LAST = np.ones((1, 1), bool), np.ones(1, bool), np.zeros(1, np.int64)


@dataclass(frozen=True)
class Limits:
    """What a memory budget was divided for.

    batch: sequences at once. context: tokens of each in the cache. pass_tokens: tokens of one forward pass.
    """

    batch: int
    context: int
    pass_tokens: int

    def check(self, rows: int, length: int, cached: int) -> None:
        """Refuses a forward pass that would take more memory than was set aside.

        Args:
            rows: sequences. length: tokens of each in this pass. cached: of each, that the cache holds then.

        Raises:
            MelinoeError: it names what was set aside, and how to set more aside.
        """
        if rows > self.batch or cached > self.context:
            raise MelinoeError(
                "this would take more memory than the budget has set aside",
                got=f"{rows} sequences of {cached} tokens",
                allowed=f"{self.batch} of {self.context}",
                next_step=f"load with context={max(cached, self.context)}, batch={max(rows, self.batch)}",
            )
        if rows * length > self.pass_tokens:
            raise MelinoeError(
                "this forward pass would take more memory than the budget has set aside",
                got=f"{rows} sequences of {length} tokens at once",
                allowed=f"{self.pass_tokens} tokens",
                next_step=f"generate with prefill_chunk_size={self.pass_tokens // self.batch}",
            )


class PagedExperts:
    """The paged experts of one model; its experts modules find it as `melinoe_paged`, and so does its user.

    pager: serves them. predictor: asked when a request begins, or None.
    tuning: the model is being tuned; its experts function tells the pager of each pass by itself.
    converted: memory in which tuning converts records to its dtype, one for each shape; see
    melinoe.experts.backward.
    limits: of what a memory budget is for; None: no budget was given, nothing is refused.
    """

    def __init__(self, pager: ExpertPager, predictor: Predictor | None = None) -> None:
        self.pager, self.predictor = pager, predictor
        self.tuning = False
        self._here = threading.local()
        self.limits: Limits | None = None
        self.converted: dict[tuple[Any, ...], torch.Tensor] = {}
        self._note = _Note()
        self._in_flight: dict[str, Prediction] | None = None  # predictions, once somebody shares them
        self._followed: dict[str, Prediction] = {}  # those that the prior is made of

    def identity(self) -> dict[str, str]:
        """Which experts these are (melinoe.models.identity)."""
        return stored_identity(self.pager.store)

    @property
    def in_place(self) -> Callable[..., torch.Tensor] | None:
        """What computes a layer's experts in this thread, instead of `compute_experts`; see `computing`."""
        return getattr(self._here, "in_place", None)

    @contextmanager
    def computing(self, in_place: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Inside of it, this thread's passes compute their experts so; no pass is noted.

        Args:
            in_place: with the arguments of `melinoe.experts.forward.compute_experts`.
        """
        self._here.in_place = in_place
        try:
            yield
        finally:
            self._here.in_place = None

    def attach(self, model: nn.Module) -> None:
        """Listens to the forward passes of a model from now on; token ids that it has not are refused."""
        refuse_unknown_ids(model)
        model.register_forward_pre_hook(self._before, with_kwargs=True)

    @torch.compiler.disable  # decisions are made anew for every pass, nothing of them may be compiled in
    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.before(model, args, kwargs)

    def before(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """To be called before each forward pass, with its arguments."""
        if self.tuning or self.in_place is not None:
            return
        tokens = given_tokens(args, kwargs)
        if tokens is None:
            return
        ends = kwargs.get("cu_seq_lens_q")
        if ends is not None and tokens.shape[0] == 1:
            if self.limits is not None:
                self.limits.check(1, int(tokens.shape[1]), 0)
            self._before_continuous_batch(ends.cpu().numpy(), tokens.shape[1])
            return
        batch, length = tokens.shape[:2]
        real = real_tokens(args, kwargs, length)
        if real is not None:
            valid = real.cpu().numpy()
        else:
            valid = _ONE if batch * length == 1 else np.ones((batch, length), bool)
        past = past_length(kwargs)
        if self.limits is not None:
            cache = kwargs.get("past_key_values")
            self.limits.check(batch, length, max(past + length, _reserved(cache)))
        if past > 0 and valid is _ONE:  # by far the most passes, and those where microseconds show
            self.decoded()
            return
        # several tokens behind a cache: the next piece of a prompt, unless decoding has begun (then it
        # is the verification of guessed tokens)
        note = self._note
        note.phase = PREFILL if past == 0 or (length > 1 and note.phase == PREFILL) else DECODE
        if self.limits is not None and batch * length >= MANY_TOKENS:
            return_holes()  # what the last one has left would come on top of what this one takes
        note.decoding = None
        after = valid[:, ::-1].cumsum(1)[:, ::-1]
        note.ages, note.valid = np.maximum(after - 1, 0).ravel(), valid.ravel()
        if past == 0:
            self._begin(input_ids(args, kwargs), valid)
        count = int(valid.sum())
        if note.phase == DECODE:
            self.pager.statistics.decode_tokens += count
        else:
            self.pager.statistics.prefill_tokens += count

    def at_layer(self, layer: int, tokens: int) -> None:
        """To be called in every MoE layer, with the tokens of the pass.

        What a layer drops lies between the keys and values that it leaves in the cache, too narrow for what
        the next ones ask for: over 30 layers of 4,000 tokens that came to 10 percent more than a budget of
        450 MiB, and comes to one percent so (docs/log.md, 2026-11-26).
        """
        if self.limits is not None and tokens >= MANY_TOKENS and (layer + 1) % RETURN_LAYERS == 0:
            return_holes()

    def _before_continuous_batch(self, ends: np.ndarray, length: int) -> None:
        """Continuous batching (generate_batch): sequences behind each other in one row, some of them prompts.

        Args:
            ends: [N + 1] where each sequence starts, and the last one ends (transformers: cu_seq_lens_q).
            length: of the row; what lies behind the last sequence is padding.
        """
        lengths = np.diff(ends)
        note = self._note
        note.phase = DECODE if lengths.max(initial=0) <= 1 else PREFILL
        positions = np.arange(length)
        note.valid = positions < ends[-1]
        sequence = np.searchsorted(ends[1:], positions, side="right").clip(max=len(lengths) - 1)
        note.ages = np.where(note.valid, ends[1:][sequence] - 1 - positions, 0)
        note.decoding = None
        if note.phase == PREFILL and lengths.min(initial=2) == 1:
            note.decoding = note.valid & (lengths[sequence] == 1)
        if self._in_flight is not None:
            self._follow(self._in_flight)
        elif note.phase == PREFILL:
            self.pager.begin()  # a prediction belongs to one prompt; here are several, at any time
        self.pager.statistics.decode_tokens += int((lengths == 1).sum())
        self.pager.statistics.prefill_tokens += int(lengths[lengths > 1].sum())

    def share_predictions(self, predictions: dict[str, Prediction]) -> None:
        """Of the sequences that continuous batching decodes now; counts from the next pass on.

        Args:
            predictions: by a name of the sequence (`Predictor.predict`).
        """
        self._in_flight = predictions

    def _follow(self, now: dict[str, Prediction]) -> None:
        """Makes the prior the mean of the predictions in flight: who has left takes his share along."""
        if now is self._followed:
            return
        kept = len(now.keys() & self._followed.keys()) / len(now) if now else 0.0
        self._followed = now
        if now and self.predictor is not None:
            self.pager.begin(*mean_prediction(list(now.values())), kept)
        else:
            self.pager.begin()

    def _begin(self, ids: torch.Tensor | None, valid: np.ndarray) -> None:
        prompts = []
        if self.predictor is not None and ids is not None:
            prompts = [row[keep].tolist() for row, keep in zip(ids.cpu().numpy(), valid, strict=True)]
            prompts = [prompt for prompt in prompts if prompt]  # a row may be padding alone
        if self.predictor is None or not prompts:
            self.pager.begin()
            return
        self.pager.begin(*mean_prediction([self.predictor.predict(prompt) for prompt in prompts]))

    def decoded(self) -> None:
        """To be called for each token of one sequence whose pass nobody is told of before."""
        self._note.phase, self._note.ages, self._note.valid = DECODE, _LAST, _REAL
        self.pager.statistics.decode_tokens += 1

    def call(self, indices: np.ndarray) -> Call:
        """The policy's view of one layer's call. indices: [T, K]."""
        tokens, note = len(indices), self._note
        if tokens == len(note.ages):
            return Call(
                indices, note.ages, note.valid, note.phase, note.decoding if note.phase == PREFILL else None
            )
        # the layers were called past the model we know: say only what the shape says
        phase = PREFILL if tokens > 1 else DECODE
        return Call(indices, np.arange(tokens - 1, -1, -1), np.ones(tokens, bool), phase)


def _reserved(cache: Any) -> int:
    """Tokens of a sequence for which a cache of fixed size has taken memory; 0 for one that grows."""
    sizes = [getattr(layer, "max_cache_len", -1) or -1 for layer in getattr(cache, "layers", None) or []]
    return max([0, *(int(size) for size in sizes)])
