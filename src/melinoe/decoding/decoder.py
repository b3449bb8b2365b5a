"""How one model decodes: eagerly, until its step was recorded, and by replay afterwards."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from melinoe.decoding.one_token import one_token
from melinoe.decoding.per_model import PerModel
from melinoe.decoding.recording import record
from melinoe.decoding.replay import OtherStep, Replay
from melinoe.decoding.segment import Different, Functions
from melinoe.decoding.state import state_of
from melinoe.experts.few_rows_linear import adjacent, few_rows_linears
from melinoe.models.layers import experts_modules

_TENSORS = ("input_ids", "position_ids")
# what else forward may be given, besides the cache; nothing but flags and numbers
_SETTINGS = ("use_cache", "logits_to_keep", "attention_mask")
_TRIES = 3  # recordings, of which no two in a row are alike
_VARIANTS = 4  # steps of one model that are kept: below and above a window's length, and so on


class Logits(dict[str, Any]):
    """A model's output, as far as transformers' loop looks at it: empty but for `logits` [1, 1, V]."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits


class Decoder:
    """Runs the steps of one model."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._lock = threading.Lock()
        self._state: Any = None
        self._replays: list[Replay] = []
        self._functions: Functions = {}
        self._signature, self._tries = "", 0  # of the last recording, and how many there were
        self._refused = ""  # by a recording
        self._cannot = ""  # in the last generation

    @property
    def why_eager(self) -> str:
        """Why its steps are not replayed, in words that follow "the model"; empty where they are."""
        return self._cannot or self._refused

    @property
    def replays(self) -> int:
        """How many different steps it has recorded."""
        return len(self._replays)

    @property
    def steps(self) -> list[Any]:
        """What its first recorded step consists of."""
        return self._replays[0].steps if self._replays else []

    @property
    def functions(self) -> int:
        """How many different functions compute a token's experts."""
        return len(self._functions)

    def begin(self, inputs: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
        """The function that runs the steps of one generation, {name: what forward is given} -> output.

        Args:
            inputs: of its first step.
        """
        model = self._model()
        assert model is not None
        cannot = _cannot(model, inputs)
        self._cannot = cannot
        if cannot:
            return partial(_eager, model)
        state = state_of(model, inputs, _sticky(model))
        with self._lock:
            if state != self._state:  # an adapter was applied, another attention was chosen, ...
                self._state, self._replays, self._refused = state, [], ""
                self._signature, self._tries, self._functions = "", 0, {}
            state = self._state
        return partial(self._step, model, state)

    @torch.no_grad()
    def _step(self, model: Any, state: Any, inputs: dict[str, Any]) -> Any:
        replays = self._replays
        if self._refused or self._state is not state:  # another generation has found the model changed
            return _eager(model, inputs)
        cache, tensors = (
            inputs["past_key_values"],
            {n: inputs[n] for n in _TENSORS if inputs.get(n) is not None},
        )
        notice = partial(_begin, model, inputs)
        for replay in replays:
            try:
                with torch.inference_mode():
                    logits = replay(cache, tensors, notice)
            except OtherStep:
                continue
            if _sticky(model) is not None:
                _sticky(model).end(cache)
            return Logits(logits)
        if len(replays) == _VARIANTS:
            return _eager(model, inputs)
        return self._record(model, cache, tensors, inputs)

    def _record(
        self, model: Any, cache: Any, tensors: dict[str, torch.Tensor], inputs: dict[str, Any]
    ) -> Any:
        _notice(model, inputs)
        calls = [module for _, module in experts_modules(model)] + few_rows_linears(model)
        sticky = _sticky(model)
        settings = {name: inputs[name] for name in _SETTINGS if name in inputs}
        with sticky.around(inputs) if sticky is not None else nullcontext():
            output, found = record(model, cache, calls, tensors, settings, sticky)
        with self._lock:
            if isinstance(found, str):
                self._refused = found
            elif self._signature != found.signature:
                self._signature, self._tries = found.signature, self._tries + 1
                if self._tries == _TRIES:
                    self._refused = "does not do the same at two lengths"
            else:
                self._signature, self._tries = "", 0
                try:
                    self._replays = [*self._replays, Replay(found, self._in_place_of)]
                except Different as error:
                    self._refused = str(error)
        return output

    def _in_place_of(self, function: Any) -> Any:
        """Experts have a faster way for one token."""
        module = getattr(function, "__self__", None)
        faster = one_token(module, self._functions) if isinstance(module, nn.Module) else None
        return faster or function


decoder_of = PerModel(Decoder)  # the one decoder of a model


def _eager(model: Any, inputs: dict[str, Any]) -> Any:
    return model(**inputs, return_dict=True)


def _begin(model: Any, inputs: dict[str, Any]) -> None:
    """A replay goes around the hooks that listen to the beginning of a pass."""
    _notice(model, inputs)
    if _sticky(model) is not None:
        _sticky(model).begin((), inputs)


def _notice(model: Any, inputs: dict[str, Any]) -> None:
    """Calls the model's own forward pre-hooks: replays and recordings go around them."""
    paged = getattr(model, "melinoe_paged", None)
    for hook in model._forward_pre_hooks.values():
        if getattr(hook, "__self__", None) is paged and paged is not None:
            paged.before(model, (), inputs)
        else:
            hook(model, (), inputs)


def _sticky(model: Any) -> Any:
    """The sticky routers of a model (melinoe.sticky); they listen to modules that a replay goes around."""
    return getattr(model, "melinoe_sticky", None)


def _cannot(model: Any, inputs: dict[str, Any]) -> str:
    """Why a model's steps cannot be replayed, as far as it shows without recording one."""
    if model.device.type != "cpu":
        return "is not on the CPU"
    cache = inputs.get("past_key_values")
    if type(cache) is not DynamicCache:
        return f"has a {type(cache).__name__}"
    return hindrance(model, inputs)


def hindrance(model: Any, inputs: dict[str, Any]) -> str:
    """What keeps a step from being one that can be done over and over, whatever it is done with."""
    if model.training:
        return "is in training mode"
    flags = {name: inputs[name] for name in inputs.keys() & set(_SETTINGS)}
    others = inputs.keys() - set(_TENSORS) - flags.keys() - {"past_key_values"}
    others |= {name for name, value in flags.items() if not (value is None or isinstance(value, int))}
    others = {name for name in others if inputs[name] is not None}
    if others:
        return f"is given {', '.join(sorted(others))}"
    if nn.modules.module._has_any_global_hook():
        return "is in a process with hooks on all modules"
    sticky = _sticky(model)
    for module in model.modules():
        before, after = ([*module._forward_pre_hooks.values()], [*module._forward_hooks.values()])
        if sticky is not None:  # its choices stay calls
            before, after = ([h for h in hooks if not sticky.owns(h)] for hooks in (before, after))
        if module is model:  # ours are called for each step; they look and change nothing
            before = [hook for hook in before if not hook.__module__.startswith("melinoe.")]
        before = [hook for hook in before if hook is not adjacent]  # nor does it: a step has one row
        if before or after or "_hf_hook" in vars(module):
            return f"has a hook on its {type(module).__name__}"
    return ""
