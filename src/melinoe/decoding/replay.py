"""Replays a recorded decode step: torch's calls as TorchScript, events as the calls they are.

What lies between two events is one function, or several: runs of small operators are one call of a program
(program.py), what else torch computes is a function of TorchScript (segment.py). Layers alike give functions
alike, with other weights: those are arguments, so that a model of any depth has few functions. All of them
are compared with what was recorded, bit for bit, before they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from melinoe.decoding.groups import Group, grouped, written_slots
from melinoe.decoding.growing import appends, users_of
from melinoe.decoding.linears import Linears
from melinoe.decoding.program import Places, Program, Room
from melinoe.decoding.recorded import Call, Event, Recording, Slot, Write, map_tensors, tensors_of
from melinoe.decoding.segment import Different, Functions, Segment


class OtherStep(Exception):
    """The text has come to a length at which the step is another one."""


class Replay:
    """One model's decode step.

    steps: what it consists of: programs, functions of TorchScript, and what stays a call.

    Args:
        in_place_of: what is called in the place of an event's function.

    Raises:
        Different: a part of it does not compute what was recorded.
    """

    def __init__(
        self, recording: Recording, in_place_of: Callable[[Any], Any] = lambda function: function
    ) -> None:
        self._inputs = [(name, slot.number) for name, slot in recording.inputs.items()]
        self._output = recording.output.number
        self._in_place_of = in_place_of
        self._rooms: list[Room] = []  # that no step is in
        if not self._made(recording, programs=True):
            self._made(recording, programs=False)
        self._places.settle(self._programs)

    def _made(self, recording: Recording, programs: bool) -> bool:
        """Makes the steps; whether the programs among them compute what torch does."""
        values, functions = {**recording.values, **recording.constants}, dict[str, Any]()
        places, kept = Places(values), _kept(recording)
        users = users_of(recording.items)
        self.steps: list[Any] = []
        self._masks = 0  # steps up to the last mask
        self._programs: list[Program] = []
        begun = False  # the cache has been updated, or experts have been asked for
        for group in grouped(recording, places.real, programs):
            event = group.items[0]
            if group.kind != "event":
                self.steps += self._computing(group, recording, places, kept, functions, users)
                begun = begun or any(isinstance(item, Write) for item in group.items)
            elif not _always_none(event):
                if event.kind == "mask" and begun:
                    raise Different("makes masks between its layers")  # there is no way back from there
                begun = begun or not (event.kind == "mask" or isinstance(event, Linears))
                self.steps.append(
                    event if isinstance(event, Linears) else _event(event, self._in_place_of(event.function))
                )
                self._masks = len(self.steps) if event.kind == "mask" else self._masks
        self._blank: list[Any] = [None] * (1 + max(slot.number for slot in (*values, *recording.constants)))
        for slot, tensor in recording.constants.items():
            self._blank[slot.number] = tensor
        self._places, self.functions = places, len(functions)
        alike: set[Any] = set()  # one of those that differ in nothing but their inputs gets other inputs
        return self._safe(written_slots(recording.items)) and all(
            one.computes_as_torch(values, recording.constants, alike) for one in self._programs
        )

    def _safe(self, written: set[Slot]) -> bool:
        """Whether what is written in place lies elsewhere than what programs make and may copy."""
        bases = {self._places.of(slot).base for slot in written}
        return not any(bases & program.makes or (written and program.copies) for program in self._programs)

    def _computing(
        self,
        group: Group,
        recording: Recording,
        places: Places,
        kept: set[Slot],
        functions: Functions,
        users: dict[Slot, list[Call]],
    ) -> list[Any]:
        values = {**recording.values, **recording.constants}
        if group.kind == "program":
            calls = list(zip(group.items, group.operators, strict=True))
            number = len(self._programs)
            self._programs.append(Program(calls, places, group.later, kept, recording.constants, number))
            return [self._programs[-1]]
        before, found, items = appends(group.items, users, values)
        for call in (one for one in group.items if isinstance(one, Call)):
            for slot in call.results:
                places.forget(slot)
        used = {slot for one in items if isinstance(one, Call) for slot in tensors_of((one.args, one.kwargs))}
        first = Segment(before, group.later | used | {one.new for one in found}) if before else None
        last = Segment(items, group.later)
        return [*([first.step(values, functions)] if first else []), *found, last.step(values, functions)]

    @contextmanager
    def _room(self) -> Iterator[Room]:
        """A step's tensors; when it ends, nothing of what it was given or has made is held on to."""
        try:
            room = self._rooms.pop()
        except IndexError:
            room = Room.of(self._blank, self._places, self._programs)
        try:
            yield room
        finally:
            room[:] = room.empty
            self._rooms.append(room)

    def __call__(
        self, cache: Cache, inputs: dict[str, torch.Tensor], notice: Callable[[], None]
    ) -> torch.Tensor:
        """Logits of one step, [1, 1, V]; updates the cache.

        Args:
            notice: called once, as soon as it is known that the step is the recorded one.

        Raises:
            OtherStep: it is not. Then nothing was updated, and no expert asked for.
        """
        with self._room() as values:
            for name, number in self._inputs:
                values[number] = inputs[name]
            for step in self.steps[: self._masks]:
                step(values, cache)
            notice()
            for step in self.steps[self._masks :]:
                step(values, cache)
            logits: torch.Tensor = values[self._output]
            return logits.clone() if values.owns(logits) else logits


def _kept(recording: Recording) -> set[Slot]:
    """Slots that somebody may hold on to beyond the step: a room's memory is used again."""
    found: set[Slot] = set()
    for item in recording.items:
        if isinstance(item, Write) and item.slot is not None:
            found.add(item.slot)
        elif isinstance(item, Event) and item.kind != "experts":
            found.update(tensors_of((item.args, item.kwargs)))
    return found


def _event(event: Event, function: Any) -> Callable[[list[Any], Any], None]:
    kind, nest = event.kind, _nest(event.returned)
    given, results = (event.args, event.kwargs), [slot.number for slot in event.results]
    plain = not event.kwargs and all(isinstance(one, Slot) for one in (*event.args, event.returned))
    if kind == "experts" and plain:
        return _Plain(function, [one.number for one in event.args], event.returned.number)

    def run(values: list[Any], cache: Any) -> None:
        args, kwargs = map_tensors(given, lambda one: values[one.number] if isinstance(one, Slot) else cache)
        result = cache.update(*args, **kwargs) if kind == "update" else function(*args, **kwargs)
        if kind == "mask" and _nest(result) != nest:
            raise OtherStep
        for number, tensor in zip(results, tensors_of(result), strict=True):
            values[number] = tensor

    return run


class _Plain:
    """Calls a function of tensors that returns one."""

    def __init__(self, function: Any, given: list[int], result: int) -> None:
        self._function, self._given, self._result = function, given, result

    def __call__(self, values: list[Any], _cache: Any) -> None:
        values[self._result] = self._function(*[values[number] for number in self._given])


def _always_none(event: Event) -> bool:
    """Whether a mask was None, and is at every length: one token behind a cache sees all of it."""
    if event.kind != "mask" or event.function is not create_causal_mask or event.returned is not None:
        return False
    overlays = ("or_mask_function", "and_mask_function", "block_sequence_ids", "attention_mask")
    return not event.args and all(event.kwargs.get(name) is None for name in overlays)


def _nest(value: Any) -> Any:
    """What is None and what is a tensor."""
    return map_tensors(value, lambda _: True)
