"""Linear layers that the compiled kernel computes, in a recorded step: those of one input together.

Such a layer is no torch function, so it stays a call and divides what would be one function of TorchScript.
The projections of attention have one input, so they are brought together, to where the first one was.
"""

from __future__ import annotations

from typing import Any

from melinoe.decoding.recorded import Call, Event, Read, Slot, Write, tensors_of
from melinoe.experts import compiled
from melinoe.experts.few_rows_linear import FewRowsLinear


class Linears(Event):
    """Layers of one input, in the place of the event of each. parts: (layer, the slot of its result)."""

    source: Slot
    parts: list[tuple[FewRowsLinear, Slot]]

    @classmethod
    def of(cls, event: Event) -> Linears | None:
        """One layer, where an event is one."""
        layer = getattr(event.function, "__self__", None)
        if not isinstance(layer, FewRowsLinear) or event.kwargs or len(event.args) != 1:
            return None
        made = cls(event.function, event.args, {}, list(event.results), kind=event.kind)
        made.source, made.parts = event.args[0], [(layer, event.results[0])]
        return made

    def __call__(self, values: list[Any], cache: Any) -> None:
        given = values[self.source.number]
        rows = given.view(-1, given.shape[-1]) if given.is_contiguous() else None
        fits = rows is not None and compiled.few(rows)
        for layer, slot in self.parts:
            found = compiled.product(rows, layer.weight) if fits else None  # type: ignore[arg-type]
            values[slot.number] = (
                layer(given) if found is None else found.view(*given.shape[:-1], len(layer.weight))
            )


def gathered(items: list[Call | Read | Write]) -> list[Call | Read | Write]:
    """The items of a recording, with the linear layers of one input at the first of them.

    They stay where they are behind a call that writes into a tensor, and behind other events.
    """
    found: list[Call | Read | Write] = []
    open_: dict[Slot, Linears] = {}
    known: set[Slot] = set()
    for item in items:
        linear = Linears.of(item) if isinstance(item, Event) else None
        if linear is not None:
            first = open_.get(linear.source)
            if first is not None:
                first.parts += linear.parts
                first.results += linear.results
                known.update(linear.results)
                continue
            open_[linear.source] = item = linear
        elif isinstance(item, Event) or _writes(item, known):
            open_ = {}
        if isinstance(item, Call):
            known.update([*tensors_of((item.args, item.kwargs)), *item.results])
        found.append(item)
    return found


def _writes(item: Call | Read | Write, known: set[Slot]) -> bool:
    """Whether a call may change a tensor that was there before it."""
    return isinstance(item, Call) and (writes_by_name(item) or bool(known & set(item.results)))


def writes_by_name(call: Call) -> bool:
    """Whether a call is one of those that write into what they are given."""
    name = getattr(call.function, "__name__", "_")
    in_place = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and name[-2:] != "__")
    return in_place or "out" in call.kwargs
