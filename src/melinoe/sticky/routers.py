"""Routers that keep a sequence to the experts it has asked for: the choice moves, the weights do not.

    m(t, e)  = how many tokens before t had expert e among their own K
    F(t)     = the C experts with the largest m(t, .)
    share    = p(t, e) / the sum of p(t, .) over the token's own K, p the softmax of the router's logits
    choice   = the K largest of share(t, e) + strength * [e in F(t)], once `after` tokens are known
    weights  = what the router gives the chosen ones without the strength

A token gives up at most `strength` of its routing weight for each expert it exchanges, where a strength in
logits, which old settings have, exchanges large shares as easily as small ones. A token's own K are those
without the strength, so m depends on the text alone and a whole text can be routed in one pass, as tuning
does. Nothing depends on what is in memory: a model with all its experts in memory makes the same choices. A
bias for the choice alone is DeepSeek-V3's; there it is the load that moves it.

The router's own code runs; answering.py puts the choice into it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from melinoe.errors import MelinoeError
from melinoe.models.forward_inputs import given_tokens, past_length, real_tokens
from melinoe.models.layers import MoeLayer, experts_per_token, moe_layers
from melinoe.sticky.answering import RouterHooks, unknown_routers
from melinoe.sticky.history import History, first_ranks, ranks_within
from melinoe.sticky.settings import SHARE, Stickiness

_HISTORY = "_melinoe_sticky_history"  # attribute of a cache: a copy of the cache takes it along
_OF_SEQUENCES = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")  # a cache's methods


class _Pass:
    """One forward pass. valid_BS: [B, S]. padded: some are False. history: None where nothing is kept."""

    def __init__(self, valid_BS: torch.Tensor, history: History | None) -> None:
        self.valid_BS, self.history = valid_BS, history
        self.padded = not bool(valid_BS.all())


class StickyRouters:
    """The sticky routers of one model.

    Raises:
        MelinoeError: the layers of the model are of several kinds, or its routers of one that we do not know.
            Where a router cannot be called by itself, it says so in the model's first pass.
    """

    def __init__(self, model: nn.Module, settings: Stickiness) -> None:
        self.settings = settings
        self.layers = moe_layers(model)
        self.top_k = experts_per_token(model)
        sizes = {layer.num_experts for layer in self.layers}
        if len(sizes) != 1:
            raise unknown_routers(model, f"layers of {sorted(sizes)} experts")
        [self.num_experts] = sizes
        self.number = settings.favoured(self.num_experts, self.top_k)
        self._config: Any = model.config
        self._uses_cache = bool(getattr(model.config, "use_cache", True))
        self._testing = False  # every router is asked for the least likely experts
        self._here = threading.local()
        self._latest: _Pass | None = None
        inner = model.get_decoder()  # type: ignore[operator]
        self._handles = [
            inner.register_forward_pre_hook(self._before, with_kwargs=True),
            inner.register_forward_hook(self._after),
        ]
        for layer in self.layers:
            hooks = RouterHooks(self, layer)
            self._handles += [
                layer.router.register_forward_pre_hook(hooks.begin),
                layer.router.register_forward_hook(hooks.end, always_call=True),
            ]

    def check(self) -> bool:
        """Calls each router once, where it needs hidden states alone.

        Returns:
            Whether all of them are known now; else the model's first pass tells.

        Raises:
            MelinoeError: its kind is unknown.
        """
        self._testing = True
        try:
            return all(self._check(layer) for layer in self.layers)
        finally:
            self._testing = False

    def _check(self, layer: MoeLayer) -> bool:
        weight = next(layer.router.parameters())
        if weight.device.type == "meta":
            return False
        config = self._config.get_text_config()
        states = torch.linspace(-1, 1, 4 * config.hidden_size, device=weight.device).view(4, -1)
        try:
            with torch.no_grad():
                layer.router(states.to(weight.dtype))
        except MelinoeError:
            raise
        except Exception:  # it wants more
            return False
        return True

    def __deepcopy__(self, _memo: Any) -> StickyRouters:
        raise MelinoeError("a sticky model cannot be copied", next_step="load it a second time")

    def detach(self) -> None:
        """Makes the routers as they were."""
        for handle in self._handles:
            handle.remove()

    def owns(self, hook: Any) -> bool:
        """Whether a hook on some module is one of these."""
        owner = getattr(hook, "__self__", None)
        return owner is self or (isinstance(owner, RouterHooks) and owner.sticky is self)

    @contextmanager
    def around(self, inputs: dict[str, Any]) -> Iterator[None]:
        """A forward pass whose beginning and end the hooks need not look at.

        Args:
            inputs: what forward is given, by name.
        """
        self.begin((), inputs)
        self._here.around = True
        try:
            yield
        finally:
            self._here.around = False
        self.end(inputs.get("past_key_values"))

    def prepare_on_device(self, cache: Any, room: int) -> History:
        """For passes of one token over this cache that are tensors alone (`History.prepare_on_device`).

        Args:
            cache: the prompt has been read into it. room: tokens that it can hold.
        """
        history: History = getattr(cache, _HISTORY)
        history.prepare_on_device(room)
        return history

    @contextmanager
    def on_device(self, history: History) -> Iterator[None]:
        """One such pass."""
        valid_BS = torch.ones(history.batch, 1, dtype=torch.bool)
        self._here.around, self._here.now = True, _Pass(valid_BS, history)
        try:
            with history.on_device():
                yield
        finally:
            self._here.around = False

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not getattr(self._here, "around", False):
            self.begin(args, kwargs)

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if not getattr(self._here, "around", False):
            self.end(getattr(output, "past_key_values", None))

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins, with these arguments."""
        tokens = given_tokens(args, kwargs)
        assert tokens is not None
        if kwargs.get("cu_seq_lens_q") is not None:
            raise MelinoeError(
                "sticky routing does not know continuous batching yet", next_step="load the model without it"
            )
        batch, length = tokens.shape[:2]
        cache, past = kwargs.get("past_key_values"), past_length(kwargs)
        valid_BS = real_tokens(args, kwargs, length)
        if valid_BS is None:
            valid_BS = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        uses_cache = kwargs.get("use_cache")
        history = None
        if cache is not None or (self._uses_cache if uses_cache is None else uses_cache):
            history = self._history_of(cache, past, batch, tokens.device)
            history.begin(valid_BS, self.top_k)
        self._here.now = self._latest = _Pass(valid_BS, history)

    def _history_of(self, cache: Any, past: int, batch: int, device: torch.device) -> History:
        found = getattr(cache, _HISTORY, None)
        if past == 0 and found is not None and found.batch == batch:
            found.clear()  # a cache that was emptied: what was captured over it knows these tensors
        elif past == 0:
            found = History(len(self.layers), batch, self.num_experts, device)
        elif found is None or past > found.length or batch != found.batch:
            raise MelinoeError(
                "this cache was not filled with this sticky routing",
                got=f"{past} tokens of {batch} sequences",
                next_step="begin with an empty cache",
            )
        elif past < found.length:
            found.cut(past)
        _keep(cache, found)
        return found

    def end(self, cache: Any) -> None:
        """The pass is done. cache: what it returned, or None."""
        now = self._here.now
        if now.history is not None:
            now.history.end(now.valid_BS)
            _keep(cache, now.history)

    @contextmanager
    def calling(self, event: Callable[..., Any]) -> Iterator[None]:
        """Inside of it, answers are made by `event("choice", function, args, kwargs)`, of this thread."""
        self._here.event = event
        try:
            yield
        finally:
            self._here.event = None

    def answer(
        self, layer: int, kind: str, top_k: int, scores_TE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a router's `topk` returns: (values [T, K], indices [T, K]). See `choose`."""
        chosen_TK = self.choose(layer, scores_TE, kind, scores_TE.topk(top_k, -1).indices)
        return scores_TE.gather(-1, chosen_TK), chosen_TK

    def ask(self, layer: int, kind: str, top_k: int, scores_TE: torch.Tensor) -> Any:
        """`answer`, or a call of it that somebody writes down."""
        event = getattr(self._here, "event", None)
        arguments = (layer, kind, top_k, scores_TE)
        return self.answer(*arguments) if event is None else event("choice", self.answer, arguments, {})

    def choose(self, layer: int, scores_TE: torch.Tensor, kind: str, chosen_TK: torch.Tensor) -> torch.Tensor:
        """[T, K] the experts of each token.

        Args:
            scores_TE: what its router chooses by. kind: "logits", or "probabilities" made of them.
            chosen_TK: what it would choose by itself.
        """
        if self._testing:
            return scores_TE.topk(chosen_TK.shape[1], -1, largest=False).indices
        # a backward pass may compute a layer again in a thread of its own
        now = getattr(self._here, "now", None) or self._latest
        if now is None or now.valid_BS.numel() != len(chosen_TK):
            return chosen_TK  # the router was called by itself
        batch, length = now.valid_BS.shape
        valid_BS, history = now.valid_BS if now.padded else None, now.history
        chosen_BSK = chosen_TK.view(batch, length, -1)
        if history is not None:
            ranks_BE, before_B = history.ranks_LBE[layer], history.tokens_B
        else:
            ranks_BE = first_ranks(self.num_experts, scores_TE.device)[None]
            before_B = torch.zeros(1, dtype=torch.int64, device=scores_TE.device)
        if length == 1:
            ranks_TE, tokens_T = ranks_BE.expand(batch, -1), before_B.expand(batch)
        else:
            ranks_TE = ranks_within(chosen_BSK, valid_BS, self.num_experts, ranks_BE).flatten(0, 1)
            tokens_BS = now.valid_BS.cumsum(1) - now.valid_BS.long() + before_B.unsqueeze(1)
            tokens_T = tokens_BS.reshape(-1)
        favoured = ranks_TE.topk(self.number, -1).indices
        if history is not None:
            history.add(layer, chosen_BSK, valid_BS)
        scores = scores_TE.detach().float()
        lift = torch.zeros_like(scores).scatter_(1, favoured, self.settings.strength)
        lift *= (tokens_T >= self.settings.after).unsqueeze(1)
        if self.settings.unit == SHARE:
            shares = scores if kind == "probabilities" else scores.softmax(-1)
            moved = shares / shares.gather(-1, chosen_TK).sum(-1, keepdim=True) + lift
        else:
            moved = scores * lift.exp() if kind == "probabilities" else scores + lift
        return moved.topk(chosen_TK.shape[1], -1).indices


def _keep(cache: Any, history: History) -> None:
    """Hangs a history on its cache, whose sequences must stay where they are from now on."""
    if cache is None or getattr(cache, _HISTORY, None) is history:
        return
    setattr(cache, _HISTORY, history)
    for name in _OF_SEQUENCES:
        setattr(cache, name, _refuse)


def _refuse(*_args: Any, **_kwargs: Any) -> None:
    raise MelinoeError(
        "sticky routing follows each sequence, and beam search exchanges them", next_step="use one beam"
    )
