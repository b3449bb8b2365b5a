"""Replays a recorded decode step: torch's calls as TorchScript, events as the calls they are.

What lies between two events is one function. Layers alike give functions alike, with other weights: those are
arguments, so that a model of any depth has few functions. TorchScript calls the same operators in the same
order on the same shapes, without Python between them; each function is compared with what was recorded, bit
for bit, before it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from melinoe.decoding.bits import same_bits
from melinoe.decoding.linears import Linears, gathered
from melinoe.decoding.recording import Call, Event, Read, Recording, Slot, Write, map_tensors, tensors_of

_CHECKS = 3  # TorchScript rewrites a function after its first runs


class Different(Exception):
    """A recording cannot be replayed; why, in words that follow "the model"."""


class OtherStep(Exception):
    """The text has come to a length at which the step is another one."""


Functions = dict[str, Callable[..., Any]]


def torchscript(function: Callable[..., Any], given: tuple[torch.Tensor, ...]) -> Callable[..., Any]:
    """What a function of tensors does, as a function of TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        return torch.jit.trace(function, given, check_trace=False)


class _Segment:
    """The calls between two events.

    inputs: slots from before it, weights included. outputs: slots that are used after it.
    """

    def __init__(self, items: list[Any], later: set[Slot]) -> None:
        self.reads = [item for item in items if isinstance(item, Read)]
        self.writes = [item for item in items if isinstance(item, Write)]
        self.calls = [item for item in items if isinstance(item, Call)]
        made: dict[Slot, None] = {}
        inputs: dict[Slot, None] = {}
        for call in self.calls:
            for slot in tensors_of((call.args, call.kwargs)):
                if slot not in made:
                    inputs[slot] = None
            made.update((slot, None) for slot in call.results if slot not in inputs)
        self.inputs = list(inputs)
        self.outputs = [slot for slot in made if slot in later]

    def key(self, values: dict[Slot, torch.Tensor]) -> str:
        """The same for segments that differ in nothing but the values of their inputs."""
        numbers: dict[Slot, int] = {slot: number for number, slot in enumerate(self.inputs)}
        lines = [f"{tuple(values[slot].shape)} {values[slot].dtype}" for slot in self.inputs]
        for call in self.calls:
            for slot in call.results:
                numbers.setdefault(slot, len(numbers))
            given = map_tensors((call.args, call.kwargs), lambda slot: Slot(numbers[slot]))
            lines.append(f"{id(call.function)} {given!r} {[numbers[slot] for slot in call.results]}")
        return "\n".join([*lines, str([numbers[slot] for slot in self.outputs])])

    def run(self, *inputs: torch.Tensor) -> Any:
        values: dict[Slot, Any] = dict(zip(self.inputs, inputs, strict=True))
        for call in self.calls:
            args, kwargs = map_tensors((call.args, call.kwargs), values.__getitem__)
            result = call.function(*args, **kwargs)
            values.update(zip(call.results, tensors_of(result), strict=True))
        outputs = tuple(values[slot] for slot in self.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def function(self, values: dict[Slot, torch.Tensor], functions: Functions) -> Callable[..., Any]:
        """Its function, made or found among those of segments alike, and compared with the recording.

        Raises:
            Different: it has another result.
        """

        def inputs() -> tuple[torch.Tensor, ...]:  # a call may write into what it is given
            return tuple(values[slot].clone() for slot in self.inputs)

        key = self.key(values)
        if key not in functions:
            try:
                functions[key] = torchscript(self.run, inputs())
            except Exception as error:  # whatever TorchScript cannot do, or a torch that no longer has it
                raise Different(f"cannot be written in TorchScript ({type(error).__name__})") from error
        for _ in range(_CHECKS):
            for slot, tensor in zip(self.outputs, tensors_of(functions[key](*inputs())), strict=True):
                if not same_bits(tensor, values[slot]):
                    raise Different("does not compute the same by TorchScript")
        return functions[key]


class Replay:
    """One model's decode step.

    steps: what it consists of: functions of TorchScript, and what stays a call.

    Args:
        in_place_of: what is called in the place of an event's function.

    Raises:
        Different: a part of it does not compute what was recorded.
    """

    def __init__(
        self, recording: Recording, in_place_of: Callable[[Any], Any] = lambda function: function
    ) -> None:
        values = {**recording.values, **recording.constants}
        functions: Functions = {}
        self._inputs = [(name, slot.number) for name, slot in recording.inputs.items()]
        self._output = recording.output.number
        self.steps: list[Any] = []
        self._masks = 0  # steps up to the last mask
        begun = False  # the cache has been updated, or experts have been asked for
        for items, later in _grouped(recording):
            if isinstance(items, Event) and _always_none(items):
                continue
            if isinstance(items, Event):
                if items.kind == "mask" and begun:
                    raise Different("makes masks between its layers")  # there is no way back from there
                begun = begun or not (items.kind == "mask" or isinstance(items, Linears))
                if isinstance(items, Linears):
                    self.steps.append(items)
                else:
                    self.steps.append(_event(items, in_place_of(items.function)))
                self._masks = len(self.steps) if items.kind == "mask" else self._masks
                continue
            segment = _Segment(items, later)
            begun = begun or bool(segment.writes)
            self.steps.append(
                _Function(
                    segment.function(values, functions) if segment.outputs else _nothing,
                    [slot.number for slot in segment.inputs],
                    [slot.number for slot in segment.outputs],
                    [(read.slot.number, read.layer, read.name) for read in segment.reads],
                    [
                        (
                            None if write.slot is None else write.slot.number,
                            write.layer,
                            write.name,
                            write.step,
                        )
                        for write in segment.writes
                    ],
                )
            )
        self._blank: list[Any] = [None] * (1 + max(slot.number for slot in values))
        for slot, tensor in recording.constants.items():
            self._blank[slot.number] = tensor
        self.functions = len(functions)

    def __call__(
        self, cache: Cache, inputs: dict[str, torch.Tensor], notice: Callable[[], None]
    ) -> torch.Tensor:
        """Logits of one step, [1, 1, V]; updates the cache.

        Args:
            notice: called once, as soon as it is known that the step is the recorded one.

        Raises:
            OtherStep: it is not. Then nothing was updated, and no expert asked for.
        """
        values = self._blank.copy()
        for name, number in self._inputs:
            values[number] = inputs[name]
        for step in self.steps[: self._masks]:
            step(values, cache)
        notice()
        for step in self.steps[self._masks :]:
            step(values, cache)
        return values[self._output]


def _nothing(*_: Any) -> tuple[()]:
    return ()


def _grouped(recording: Recording) -> Iterable[tuple[Any, set[Slot]]]:
    """(an event, or the items between two, the slots that are used behind it)."""
    groups: list[Any] = []
    for item in gathered(recording.items):
        if isinstance(item, Event):
            groups.append(item)
        elif groups and isinstance(groups[-1], list):
            groups[-1].append(item)
        else:
            groups.append([item])
    later = {recording.output}
    found = []
    for group in reversed(groups):
        used = set(later)
        if isinstance(group, list):
            used.update(item.slot for item in group if isinstance(item, Write) and item.slot is not None)
        found.append((group, used))
        for item in [group] if isinstance(group, Event) else group:
            if isinstance(item, Call):
                later.update(tensors_of((item.args, item.kwargs)))
    return reversed(found)


class _Function:
    def __init__(self, function: Any, inputs: Any, outputs: Any, reads: Any, writes: Any) -> None:
        self._function, self._inputs, self._outputs = function, inputs, outputs
        self._reads, self._writes = reads, writes

    def __call__(self, values: list[Any], cache: Any) -> None:
        layers = cache.layers
        for number, layer, name in self._reads:
            values[number] = getattr(layers[layer], name)
        result = self._function(*[values[number] for number in self._inputs])
        if len(self._outputs) == 1:
            values[self._outputs[0]] = result
        else:
            for number, tensor in zip(self._outputs, result, strict=True):
                values[number] = tensor
        for number, layer, name, step in self._writes:
            if number is None:
                setattr(layers[layer], name, getattr(layers[layer], name) + step)
            else:
                setattr(layers[layer], name, values[number])


def _event(event: Event, function: Any) -> Callable[[list[Any], Any], None]:
    kind, nest = event.kind, _nest(event.returned)
    given, results = (event.args, event.kwargs), [slot.number for slot in event.results]

    def run(values: list[Any], cache: Any) -> None:
        args, kwargs = map_tensors(given, lambda one: values[one.number] if isinstance(one, Slot) else cache)
        result = cache.update(*args, **kwargs) if kind == "update" else function(*args, **kwargs)
        if kind == "mask" and _nest(result) != nest:
            raise OtherStep
        for number, tensor in zip(results, tensors_of(result), strict=True):
            values[number] = tensor

    return run


def _always_none(event: Event) -> bool:
    """Whether a mask was None, and is at every length: one token behind a cache sees all of it."""
    if event.kind != "mask" or event.function is not create_causal_mask or event.returned is not None:
        return False
    overlays = ("or_mask_function", "and_mask_function", "block_sequence_ids", "attention_mask")
    return not event.args and all(event.kwargs.get(name) is None for name in overlays)


def _nest(value: Any) -> Any:
    """What is None and what is a tensor."""
    return map_tensors(value, lambda _: True)
