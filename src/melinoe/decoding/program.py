"""Runs of small operators between two other steps, as one call of native/program.c."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from melinoe.decoding.bits import same_bits
from melinoe.decoding.linears import Linears
from melinoe.decoding.operators import DIMS, DTYPES, MATRICES, Code, Operator, Part, merged, native
from melinoe.decoding.recorded import Call, Slot, map_tensors, tensors_of
from melinoe.native import library

BRIEF = 2**19  # weights up to which no other thread of Python needs to run meanwhile
_ALIGNED = 64  # bytes
_SEEDS = 3  # what was recorded, and other inputs


class Room(list[Any]):
    """The tensors of one step that runs, by the numbers of their slots; steps at once have one each.

    empty: what it holds between two steps: constants, and memory for what programs leave to other steps.
    pointers: of each program, where its tensors lie.
    """

    empty: list[Any]
    pointers: list[Any]
    _memory: list[torch.Tensor]
    _storages: frozenset[int]

    @classmethod
    def of(cls, blank: list[Any], places: Places, programs: list[Program]) -> Room:
        """blank: the constants, by number."""
        room = cls(blank)
        room._memory = [_bytes(max((one.inner_bytes for one in programs), default=0))]
        for slot, like in places.owned.items():
            place = places.of(slot)
            if place.base == slot:
                room[slot.number] = empty_like(like)
                room._memory.append(room[slot.number])
        for slot, like in places.owned.items():
            place = places.of(slot)
            if place.base != slot:
                room[slot.number] = room[place.base.number].as_strided(
                    like.shape, like.stride(), place.offset
                )
        room.pointers = [program.pointers(room, room._memory[0]) for program in programs]
        room._storages = frozenset(one.untyped_storage().data_ptr() for one in room._memory)
        room.empty = list(room)
        return room

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in memory that the next step uses again."""
        return tensor.untyped_storage().data_ptr() in self._storages


class Place(NamedTuple):
    """Where a slot's tensor lies: in the tensor of another slot, from an offset in elements on."""

    base: Slot
    offset: int


class Places:
    """Where the tensors of a recording lie, as far as programs know.

    real: tensors that lie in memory as those of a step will. owned: slots whose memory belongs to a room,
    {slot: a tensor like it}.
    """

    def __init__(self, values: dict[Slot, torch.Tensor]) -> None:
        self.real = dict(values)
        self.owned: dict[Slot, torch.Tensor] = {}
        self._views: dict[Slot, Slot] = {}
        self._settled: dict[Slot, Place] = {}

    def settle(self, programs: list[Program]) -> None:
        """Lets go of what was recorded: shapes are enough from now on."""
        needed = {*self.owned, *(slot for program in programs for slot in program.inner)}
        offsets = {slot: self.of(slot) for slot in self.owned}
        shapes = {slot: _shape_of(self.real[slot]) for slot in needed}
        self.real.clear()
        self.real.update(shapes)
        self.owned = {slot: shapes[slot] for slot in self.owned}
        self._settled = offsets
        for program in programs:
            program.settle(shapes)

    def see(self, slot: Slot, arguments: list[Slot]) -> bool:
        """Notes that a slot is a view of one of these; whether it is."""
        storage = self.real[slot].untyped_storage().data_ptr()
        for argument in arguments:
            if self.real[argument].untyped_storage().data_ptr() == storage:
                self._views[slot] = self._views.get(argument, argument)
                return True
        return False

    def forget(self, slot: Slot) -> None:
        """A slot is made by other steps, wherever they put it."""
        self._views.pop(slot, None)

    def of(self, slot: Slot) -> Place:
        if slot in self._settled:
            return self._settled[slot]
        base = self._views.get(slot, slot)
        return Place(base, self.real[slot].storage_offset() - self.real[base].storage_offset())


class Program:
    """A step of a replay: operators, and the views among what they are given and what they make.

    Args:
        calls: each with its operators.
        later: slots that are used behind it.
        kept: of those, slots that somebody may keep: they are copied out of the room.
        number: which program of its replay it is.

    inner: slots that nobody else needs. makes: slots whose memory it writes. copies: it copies some of its
    results out of the room.
    """

    def __init__(
        self,
        calls: list[tuple[Call, list[Operator]]],
        places: Places,
        later: set[Slot],
        kept: set[Slot],
        constants: dict[Slot, torch.Tensor],
        number: int,
    ) -> None:
        self.number, self.calls, self._real = number, [call for call, _ in calls], places.real
        operators = [one for _, some in calls for one in some]
        self.makes = made = {one.out.slot for one in operators}
        known = dict.fromkeys(slot for call in self.calls for slot in call.results)
        self._inputs = list(
            dict.fromkeys(
                s for call in self.calls for s in tensors_of((call.args, call.kwargs)) if s not in known
            )
        )
        for call in self.calls:
            given = tensors_of((call.args, call.kwargs))
            for slot in call.results:
                if slot in made:
                    places.forget(slot)
                else:
                    places.see(slot, given)
        self.results = [slot for slot in known if slot in later]
        last = {places.of(slot).base for slot in self.results}
        self.inner = [slot for slot in made if slot not in last]
        self._own = {slot: places.real[slot] for slot in made if slot in last}
        places.owned.update(self._own)
        used = [places.of(part.slot).base for one in operators for part in _parts(one)]
        self._bases = list(dict.fromkeys(used))
        self._given = [
            (number, base.number, places.real[base].stride())
            for number, base in enumerate(self._bases)
            if base not in made and base not in places.owned and base not in constants
        ]
        self._late: list[Any] = []  # views of what other steps make
        for slot in self.results:
            place, tensor = places.of(slot), places.real[slot]
            if place.base == slot:
                continue
            if place.base in places.owned:
                self._own[slot] = places.owned[slot] = tensor
            else:
                self._late.append((slot.number, place, tensor.shape, tensor.stride()))
        self._kept = [slot.number for slot in self.results if slot in kept]
        self.copies = bool(self._kept)
        self._places_of = {slot: places.of(slot) for slot in (*self._inputs, *known)}
        self.inner_bytes = sum(_span(places.real[slot]) for slot in self.inner)
        numbers = [number for one in operators for number in self._numbers(one, places)]
        self._program = (ctypes.c_int64 * len(numbers))(*numbers)
        weights = sum(one.sizes[1] * one.sizes[2] for one in operators if one.code in MATRICES)
        function = native().melinoe_program
        self._run: Callable[[int, int, int], int] = library.brief(function) if weights <= BRIEF else function
        self._whole = ctypes.addressof(self._program), len(operators)

    def _numbers(self, one: Operator, places: Places) -> list[int]:
        parts = _parts(one)
        if one.code in MATRICES:
            sizes, strides = list(one.sizes), [[0] * DIMS for _ in parts]
        elif one.code == Code.MEAN:
            sizes, strides = list(one.sizes), [list(part.tensor.stride()) for part in parts]
        else:
            sizes, strides = merged(one.sizes, [part.tensor.stride() for part in parts])
        ones = [1] * (DIMS - len(sizes))
        if one.code in MATRICES:
            sizes = [*sizes, *ones]
        else:
            sizes, strides = [*ones, *sizes], [[*(0 for _ in ones), *of] for of in strides]
        found = [int(one.code), one.extra, *sizes]
        for part, steps in zip(parts, strides, strict=True):
            place = places.of(part.slot)
            offset = place.offset + part.tensor.storage_offset() - places.real[part.slot].storage_offset()
            reach = offset + _elements(part.tensor)
            assert offset >= 0 and reach <= _elements(places.real[place.base]), "beyond a tensor"
            found += [self._bases.index(place.base), offset, DTYPES[part.tensor.dtype], *steps]
        return [*found, *([0] * (3 + DIMS) if len(parts) == 2 else [])]

    def settle(self, shapes: dict[Slot, torch.Tensor]) -> None:
        """Keeps of the tensors that it was made with their shapes alone."""
        self._own = {slot: shapes[slot] for slot in self._own}

    def pointers(self, room: Room, inner: torch.Tensor) -> Any:
        """Where its tensors lie in a room; those that other steps make are filled in by each run.

        inner: memory for what nobody else needs.
        """
        where, at = {}, inner.data_ptr()
        for slot in self.inner:
            where[slot] = at
            at += _span(self._real[slot])
        for base in self._bases:
            if base not in where and room[base.number] is not None:
                where[base] = room[base.number].data_ptr()
        return (ctypes.c_void_p * len(self._bases))(*(where.get(base) for base in self._bases))

    def __call__(self, room: Room, _cache: Any) -> None:
        pointers = room.pointers[self.number]
        copies = []
        for at, number, strides in self._given:
            tensor = room[number]
            if tensor.stride() != strides:
                tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
                copies.append(tensor)  # until it was read
            pointers[at] = tensor.data_ptr()
        if self._run(*self._whole, ctypes.addressof(pointers)):
            raise MemoryError("no memory for a row of a matrix")
        for number, place, shape, strides in self._late:
            base = room[place.base.number]
            room[number] = base.as_strided(shape, strides, base.storage_offset() + place.offset)
        for number in self._kept:
            room[number] = room[number].clone()

    def computes_as_torch(
        self, values: dict[Slot, torch.Tensor], constants: dict[Slot, torch.Tensor], alike: set[Any]
    ) -> bool:
        """Whether it gives what was recorded, and what torch gives for other inputs, bit for bit.

        alike: those that were given other inputs: one of a kind is. It is added.
        """
        numbers = {slot: number for number, slot in enumerate(self._places_of)}
        kind = tuple(self._program), tuple(self._calls_by_number(numbers))
        seeds, size = 1 if kind in alike else _SEEDS, 1 + max(slot.number for slot in (*values, *constants))
        alike.add(kind)
        places = {slot: self._places_of[slot] for slot in self._inputs}
        for seed in range(seeds):
            room = Room([None] * size)
            for slot in {*self._bases, *(place.base for place in places.values())} & constants.keys():
                room[slot.number] = constants[slot]
            for slot, like in self._own.items():
                room[slot.number] = empty_like(like)
            real: dict[Slot, torch.Tensor] = {}
            for slot, place in places.items():
                if place.base in constants:
                    base = constants[place.base]
                elif room[place.base.number] is None:
                    base = room[place.base.number] = empty_like(self._real[place.base])
                else:
                    base = room[place.base.number]
                like = self._real[slot]
                real[slot] = base.as_strided(like.shape, like.stride(), base.storage_offset() + place.offset)
                if place.base not in constants:
                    real[slot].copy_(values[slot] if seed == 0 else _random(like, seed))
            for slot, like in self._own.items():
                base = room[self._places_of[slot].base.number]
                if self._places_of[slot].base != slot:
                    room[slot.number] = base.as_strided(
                        like.shape, like.stride(), self._places_of[slot].offset
                    )
            inner = _bytes(self.inner_bytes)
            room.pointers = [None] * self.number + [self.pointers(room, inner)]
            self(room, None)
            expected = self._by_torch(real)
            for slot in self.results:
                if not same_bits(room[slot.number], expected[slot]):
                    return False
                if seed == 0 and not same_bits(room[slot.number], values[slot]):
                    return False
        return True

    def _calls_by_number(self, numbers: dict[Slot, int]) -> Iterator[str]:
        for call in self.calls:
            given = map_tensors((call.args, call.kwargs), lambda slot: Slot(numbers[slot]))
            yield f"{call.function.__qualname__} {given!r} {[numbers[slot] for slot in call.results]}"

    def _by_torch(self, real: dict[Slot, torch.Tensor]) -> dict[Slot, torch.Tensor]:
        real = dict(real)
        for call in self.calls:
            if isinstance(call, Linears):
                real.update((slot, layer(real[call.source])) for layer, slot in call.parts)
                continue
            args, kwargs = map_tensors((call.args, call.kwargs), real.__getitem__)
            result = call.function(*args, **kwargs)
            real.update(zip(call.results, tensors_of(result), strict=True))
        return real


def _parts(one: Operator) -> list[Part]:
    return [one.out, one.a, *([one.b] if one.b is not None else [])]


def _shape_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like it, without memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _elements(tensor: torch.Tensor) -> int:
    """From its first number to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _span(tensor: torch.Tensor) -> int:
    """Bytes of memory for a tensor like this one, so that the next begins where torch would let it begin."""
    return -(-_elements(tensor) * tensor.element_size() // _ALIGNED) * _ALIGNED


def _bytes(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of its own with the same shape and strides."""
    return torch.empty(_elements(tensor), dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _random(like: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like.dtype)
