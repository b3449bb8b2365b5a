"""What a recording consists of: calls of torch, what stays a call, reads from the cache and writes to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

# what may be done with a growing tensor inside of a call that is looked into
GROWING = {"update": ("cat", "__getitem__"), "attention": ("scaled_dot_product_attention",)}
GROWING_RESULTS = ("mask", "update", "expand")  # kinds of events
_PLAIN = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor of the recording, by its number."""

    number: int

    def __hash__(self) -> int:
        return self.number


@dataclass
class Call:
    """One torch function. Tensors are Slots in `args` and `kwargs`.

    results: the slots of what it returned, in the order of `tensors_of`.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    results: list[Slot] = field(default_factory=list)


@dataclass
class Event(Call):
    """A call that stays one. kind: mask, update, attention, experts or choice."""

    kind: str = ""
    returned: Any = None  # with Slots


@dataclass
class Read:
    """A tensor of the cache, as it is before the step: layers[layer].name."""

    layer: int
    name: str
    slot: Slot


@dataclass
class Write:
    """What the step leaves in the cache: layers[layer].name = slot, or += step where slot is None."""

    layer: int
    name: str
    slot: Slot | None
    step: int = 0


class TheCache:
    """Stands for the cache in the arguments of an event."""

    def __repr__(self) -> str:
        return "the cache"


CACHE = TheCache()


@dataclass
class Recording:
    """One decode step.

    items: calls, events, reads and writes in order. inputs: the slots of what the step was given, by name.
    constants: {slot: tensor} parameters and buffers. output: the slot of the logits.
    """

    inputs: dict[str, Slot] = field(default_factory=dict)
    items: list[Call | Read | Write] = field(default_factory=list)
    constants: dict[Slot, torch.Tensor] = field(default_factory=dict)
    values: dict[Slot, torch.Tensor] = field(default_factory=dict)
    output: Slot = Slot(-1)
    _numbers: int = 0  # of slots, once there were new ones

    def constant(self, tensor: torch.Tensor) -> Slot:
        """A new slot for a weight that torch's functions were not seen to use."""
        if not self._numbers:
            self._numbers = 1 + max(slot.number for slot in (*self.values, *self.constants))
        slot, self._numbers = Slot(self._numbers), self._numbers + 1
        self.constants[slot] = tensor.detach()
        return slot

    @property
    def signature(self) -> str:
        """The same for two steps that do the same, at whatever length of the text."""
        lines = [str(self.inputs), str(self.output)]
        for item in self.items:
            if isinstance(item, Call):
                function = getattr(item.function, "__func__", item.function)  # bound anew at each access
                lines.append(f"{function!r} {item.args!r} {item.kwargs!r} {item.results!r}")
                lines.append(f"{item.kind} {item.returned!r}" if isinstance(item, Event) else "")
            else:
                lines.append(repr(item))
        return "\n".join(lines)


def map_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """A nest of tuples, lists, dicts and slices with its tensors (and Slots, and caches) exchanged."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (torch.Tensor, Slot, Cache, TheCache)):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(one, change) for one in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(one, change) for one in value)
    if isinstance(value, dict):
        return {key: map_tensors(one, change) for key, one in value.items()}
    if isinstance(value, slice):
        return slice(*(map_tensors(one, change) for one in (value.start, value.stop, value.step)))
    return value


def tensors_of(value: Any) -> list[Any]:
    """The tensors (or Slots) of a nest, in a fixed order."""
    found: list[Any] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Any]) -> None:
    if isinstance(value, (torch.Tensor, Slot)):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for one in value:
            _collect(one, found)
    elif isinstance(value, dict):
        for one in value.values():
            _collect(one, found)
    elif isinstance(value, slice):
        _collect((value.start, value.stop, value.step), found)
