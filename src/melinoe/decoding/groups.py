"""Divides a recorded step: events, runs of small operators for native/program.c, and the rest for torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from melinoe.decoding.linears import Linears, gathered, writes_by_name
from melinoe.decoding.operators import SAME, Operator, Part, native, operators, product
from melinoe.decoding.recorded import (
    GROWING,
    GROWING_RESULTS,
    Call,
    Event,
    Read,
    Recording,
    Slot,
    Write,
    tensors_of,
)
from melinoe.experts import compiled

_FEW = 3  # operators between two parts of torch's that are not worth a call of their own


@dataclass
class Group:
    """Items that are one step.

    kind: event, torch or program. operators: of each item of a program. later: slots that are used behind it.
    """

    kind: str
    items: list[Any] = field(default_factory=list)
    operators: list[list[Operator]] = field(default_factory=list)
    later: set[Slot] = field(default_factory=set)

    @property
    def count(self) -> int:
        return sum(map(len, self.operators))


def grouped(recording: Recording, real: dict[Slot, torch.Tensor], programs: bool) -> list[Group]:
    """The groups of a recording in order.

    Args:
        real: the recorded tensors; those that programs make are put in their place.
        programs: whether there may be programs.
    """
    items = gathered(recording.items)
    programs = programs and native() is not None
    found: list[Group] = []
    waiting: list[Any] = []  # views: they go with what comes next
    growing = growing_slots(items)
    for item in items:
        some = _operators(item, real, growing, recording) if programs else None
        if isinstance(item, Call) and some == []:
            if not set(item.results) <= set(tensors_of((item.args, item.kwargs))):  # else it does nothing
                waiting.append(item)
            continue
        kind = "program" if some is not None else "event" if isinstance(item, Event) else "torch"
        _put_views(found, kind, waiting)
        _put(found, kind, item, some)
    _put_views(found, "event", waiting)
    found = _without_short(found)
    later = {recording.output}
    for group in reversed(found):
        group.later = set(later)
        if group.kind != "event":
            group.later.update(
                one.slot for one in group.items if isinstance(one, Write) and one.slot is not None
            )
        for one in group.items:
            if isinstance(one, Call):
                later.update(tensors_of((one.args, one.kwargs)))
    return found


def _put(found: list[Group], kind: str, item: Any, some: list[Operator] | None) -> None:
    if kind == "event" or not found or found[-1].kind != kind:
        found.append(Group(kind))
    found[-1].items.append(item)
    found[-1].operators.append(some or [])


def _put_views(found: list[Group], kind: str, views: list[Any]) -> None:
    """Views go with what comes next; before an event, with what torch computed before them."""
    if kind == "event":
        kind = "torch" if found and found[-1].kind == "torch" else "program"
    for view in views:
        _put(found, kind, view, [])
    views.clear()


def _without_short(groups: list[Group]) -> list[Group]:
    """A few operators stay with torch where it computes what is around them."""
    found: list[Group] = []
    for number, group in enumerate(groups):
        around = [groups[n].kind for n in (number - 1, number + 1) if 0 <= n < len(groups)]
        linear = any(isinstance(item, Linears) for item in group.items)
        if group.kind == "program" and not linear and group.count < _FEW * around.count("torch"):
            group = Group("torch", group.items, group.operators)
        if found and group.kind == "torch" == found[-1].kind:
            found[-1].items += group.items
            found[-1].operators += group.operators
        else:
            found.append(group)
    return found


def growing_slots(items: list[Call | Read | Write]) -> set[Slot]:
    """Of tensors that grow with the text."""
    found: set[Slot] = set()
    for item in items:
        if isinstance(item, Read):
            found.add(item.slot)
        elif isinstance(item, Event):
            found.update(item.results if item.kind in GROWING_RESULTS else ())
        elif isinstance(item, Call) and found.intersection(tensors_of((item.args, item.kwargs))):
            grows = getattr(item.function, "__name__", "") in GROWING["update"]
            found.update(item.results if grows else ())
    return found


def written_slots(items: list[Call | Read | Write]) -> set[Slot]:
    """Of tensors that a call writes into, after others may have looked at them."""
    found: set[Slot] = set()
    known: set[Slot] = set()
    for item in items:
        if not isinstance(item, Call):
            continue
        given = tensors_of((item.args, item.kwargs))
        if writes_by_name(item):
            found.update([*given[:1], *tensors_of(item.kwargs.get("out"))])
        # what returns its argument as it is may be a view; anything else has changed it
        if getattr(item.function, "__name__", "") not in SAME:
            found.update(known.union(given).intersection(item.results))
        known.update([*given, *item.results])
    return found


def _operators(
    item: Any, real: dict[Slot, torch.Tensor], growing: set[Slot], recording: Recording
) -> list[Operator] | None:
    if isinstance(item, Linears):
        return _products(item, real, growing, recording)
    if not isinstance(item, Call) or isinstance(item, Event):
        return None
    if growing.intersection(tensors_of((item.args, item.kwargs))):
        return None
    return operators(item, real)


def _products(
    linears: Linears, real: dict[Slot, torch.Tensor], growing: set[Slot], recording: Recording
) -> list[Operator] | None:
    given = real[linears.source]
    if linears.source in growing or not given.is_contiguous():
        return None
    rows = given.view(-1, given.shape[-1])
    function = compiled.product_function(rows, [layer.weight for layer, _ in linears.parts])
    if function is None:
        return None
    found = []
    for layer, slot in linears.parts:
        weight = recording.constant(layer.weight)
        real[weight] = recording.constants[weight]
        found.append(
            product(Part(slot, real[slot]), Part(linears.source, given), Part(weight, real[weight]), function)
        )
    return found
