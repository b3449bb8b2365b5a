"""Records what a model computes for one token: torch's calls, in order, and what stays a call of its own.

A decode step is run once as it is, on the token that is due, and every torch function it calls is written
down. What depends on how long the text is, is not looked into and stays a call: the functions that make
masks, the cache's `update`, `expand_kv` of latent attention, the attention functions; and the experts, which
are somebody else's work. The tensors that grow with the text may be handed from one of those to the next and
be looked at by nobody else. So nothing that is written down can depend on the length, and a model that
touches its cache, its keys or its masks in any other way is refused: it runs as before. Two steps are
recorded, and must be the same.

Two of those calls are looked into where their code is known: `update` of a cache that grows by concatenation,
and attention through sdpa without a mask. There, growing tensors may be concatenated, sliced by constants,
and given to sdpa; anything else makes it a call again.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from melinoe.decoding.recorded import (
    CACHE,
    GROWING,
    GROWING_RESULTS,
    Call,
    Event,
    Read,
    Recording,
    Slot,
    Write,
    map_tensors,
    tensors_of,
)
from melinoe.decoding.watching import WatchedCache, watched_by

# what may be asked about a tensor without reading its values, besides its properties (shape, dtype, ...)
_ABOUT = frozenset(
    (
        "size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "storage_offset",
        "is_contiguous", "is_floating_point", "is_complex", "get_device", "__len__", "is_inference",
        "is_signed", "__hash__",
        # no tensor's; gradients are off already, so a module's no_grad changes nothing
        "_set_grad_enabled", "is_grad_enabled", "is_autocast_enabled", "get_default_dtype",
    )
)  # fmt: skip
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


class _Unknown(Exception):
    """A tensor of unknown origin; caught before anything is called."""


def only_about(function: Any) -> bool:
    """Whether a torch function tells of a tensor what does not depend on its values."""
    name = getattr(function, "__name__", "")
    return name == "__get__" or name in _ABOUT


class Recorder(TorchFunctionMode):
    """Makes one `Recording`; see `record`.

    refused: why it cannot be one, in words that follow "the model". From then on nothing is watched, and the
    step goes on to its end as it would without us.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.recording = Recording()
        self.refused = ""
        self._alive: list[torch.Tensor] = []  # so that no id is used twice
        self._slots: dict[int, Slot] = {}
        self._growing: set[Slot] = set()
        self._own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._paused = False
        self._inside = ""  # a call that is looked into
        self._settings = _settings()

    def refuse(self, reason: str) -> None:
        if not self._paused:
            self.refused, self._paused = reason, True

    def new(self, tensor: torch.Tensor, growing: bool = False) -> Slot:
        known = self._slots.get(id(tensor))
        if known is None:
            known = self._slots[id(tensor)] = Slot(len(self._alive))
            self._alive.append(tensor)
        if growing:
            self._growing.add(known)
        with torch._C.DisableTorchFunction():  # our own calls are no part of the step
            own = tensor.detach()
            self.recording.values[known] = own if known in self._growing else own.clone()
        return known

    def known(self, value: Any) -> Any:
        """The slot of a tensor that is handed to a call; the sign for a cache."""
        if isinstance(value, Cache):
            return CACHE
        slot = self._slots.get(id(value))
        if slot is None:
            if id(value) not in self._own:
                raise _Unknown
            slot = self._slots[id(value)] = Slot(len(self._alive))
            self._alive.append(value)
            with torch._C.DisableTorchFunction():
                self.recording.constants[slot] = value.detach()
        return slot

    def event(self, kind: str, function: Any, args: Any, kwargs: Any) -> Any:
        """Calls `function` without looking into it."""
        noted = None if self._paused else self._noted((args, kwargs), kind)
        if noted is None:  # inside of another one, or refused
            return function(*args, **kwargs)
        self._paused = True
        try:
            result = function(*args, **kwargs)
            event = Event(function, noted[0], noted[1], kind=kind)
            self._note(result, event, growing=kind in GROWING_RESULTS)
            event.returned = map_tensors(result, self.known)
        finally:
            self._paused = False
        return result

    def _noted(self, nest: Any, name: str) -> Any:
        """A nest with slots for its tensors; None, and refused, where one is of unknown origin."""
        try:
            return map_tensors(nest, self.known)
        except _Unknown:
            self.refuse(f"uses a tensor that is neither a weight nor made by torch's functions ({name})")
            return None

    def attention(self, function: Any, args: Any, kwargs: Any) -> Any:
        if function is not sdpa_attention_forward or self._paused:
            return self.event("attention", function, args, kwargs)
        mask = args[4] if len(args) > 4 else kwargs.get("attention_mask")
        with torch._C.DisableTorchFunction():
            looked_into = mask is None and self._looks_into_sdpa(args, kwargs)
        if not looked_into:
            return self.event("attention", function, args, kwargs)
        self._inside = "attention"
        try:
            return function(*args, **kwargs)
        finally:
            self._inside = ""

    def _looks_into_sdpa(self, args: Any, kwargs: Any) -> bool:
        """Whether sdpa_attention_forward hands key and value to sdpa as they are."""
        module, query, key, value = args[:4]
        groups = getattr(module, "num_key_value_groups", 1)
        same_width = key.shape[-1] == value.shape[-1] <= 256  # else it repeats keys or packs queries
        return (
            query.device.type == "cpu"
            and kwargs.get("position_bias") is None
            and kwargs.get("cache") is None
            and (groups == 1 or same_width)
        )

    def update(self, cache: Cache, key: Any, value: Any, layer_idx: int, more: Any, named: Any) -> Any:
        layer: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
        known = type(cache) is DynamicCache and not cache.offloading and type(layer) in _LAYERS
        if self._paused or not known or not layer.is_initialized or getattr(layer, "record_past", False):
            return self.event("update", cache.update, (key, value, layer_idx, *more), named)
        before = dict(vars(layer))
        for name in ("keys", "values"):
            slot = self.new(before[name], growing=True)
            self.recording.items.append(Read(layer_idx, name, slot))
        self._inside = "update"
        try:
            result = cache.update(key, value, layer_idx, *more, **named)
        finally:
            self._inside = ""
        for name, now in vars(layer).items():
            if now is before[name] or self.refused:
                continue
            if isinstance(now, torch.Tensor):
                self.recording.items.append(Write(layer_idx, name, self._slots[id(now)]))
            elif type(now) is int and name == "cumulative_length":
                self.recording.items.append(Write(layer_idx, name, None, now - before[name]))
            else:
                self.refuse(f"has a cache whose {name} changes")
        return result

    def _note(self, result: Any, call: Call, growing: bool = False) -> None:
        for tensor in tensors_of(result):
            slot = self.new(tensor, growing)
            call.results.append(slot)
        self.recording.items.append(call)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        about = only_about(func)
        noted = self._noted((args, kwargs), name)
        growing = any(slot in self._growing for slot in tensors_of(noted))
        if growing and not (self._inside and (about or name in GROWING[self._inside])):
            self.refuse(f"looks at a tensor that grows with the text ({name})")
        elif name == "__set__":
            self.refuse("sets a property of a tensor")
        elif _settings() != self._settings:
            self.refuse("computes a part with other settings of torch than the rest")
        result = func(*args, **kwargs)
        if self._paused:  # refused
            return result
        if tensors_of(result):
            self._note(result, Call(func, *noted), growing=growing and self._inside == "update")
        elif not about:
            self.refuse(f"reads values of a tensor ({name})")
        return result


def _settings() -> tuple[bool, ...]:
    """Of torch: what changes a result, and may be changed for the length of a call."""
    return (torch._C._get_mkldnn_enabled(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())


def record(
    model: Any,
    cache: Cache,
    experts: list[nn.Module],
    inputs: dict[str, torch.Tensor],
    more: dict[str, Any],
    sticky: Any = None,
) -> tuple[Any, Recording | str]:
    """Runs one decode step, and records it.

    Args:
        experts: modules that stay calls.
        inputs: tensors for forward, by name: one token's. more: its other arguments, besides the cache.
        sticky: the model's sticky routers (melinoe.sticky), whose choices stay calls.

    Returns:
        What forward returned, and the recording, or why there is none, in words that follow "the model".
    """
    recorder = Recorder(model)
    recording = recorder.recording
    recording.inputs = {name: recorder.new(tensor) for name, tensor in inputs.items()}
    weights = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_inference()]
    versions = [tensor._version for tensor in weights]
    choices = sticky.calling(recorder.event) if sticky is not None else nullcontext()
    with watched_by(recorder, model, experts), choices, recorder:
        output = model.forward(**inputs, **more, past_key_values=WatchedCache(recorder, cache))
    output.past_key_values = cache
    if not recorder.refused and [tensor._version for tensor in weights] != versions:
        recorder.refuse("changes its own weights or buffers")
    if not recorder.refused:
        recording.output = recorder._noted(output.logits, "logits")
    return output, recorder.refused or recording
