"""What torch computes between two other steps of a replay, as one function of TorchScript."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from melinoe.decoding.bits import same_bits
from melinoe.decoding.recorded import Call, Read, Slot, Write, map_tensors, tensors_of

_OF_ONE_RESULT = (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.embedding)
CHECKS = 3  # TorchScript rewrites a function after its first runs


class Different(Exception):
    """A recording cannot be replayed; why, in words that follow "the model"."""


Functions = dict[str, Callable[..., Any]]


def torchscript(function: Callable[..., Any], given: tuple[torch.Tensor, ...]) -> Callable[..., Any]:
    """What a function of tensors does, as a function of TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        return torch.jit.trace(function, given, check_trace=False)


class Segment:
    """Calls of torch's that are one function.

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
        for _ in range(CHECKS):
            for slot, tensor in zip(self.outputs, tensors_of(functions[key](*inputs())), strict=True):
                if not same_bits(tensor, values[slot]):
                    raise Different("does not compute the same by TorchScript")
        return functions[key]

    def step(self, values: dict[Slot, torch.Tensor], functions: Functions) -> Any:
        """What runs it on the tensors of a step."""
        if len(self.calls) == 1 and not self.reads and not self.writes:
            one = Direct.of(self.calls[0])
            if one is not None:
                return one
        return Step(
            self.function(values, functions) if self.outputs else _nothing,
            [slot.number for slot in self.inputs],
            [slot.number for slot in self.outputs],
            [(read.slot.number, read.layer, read.name) for read in self.reads],
            [(w.slot.number if w.slot is not None else None, w.layer, w.name, w.step) for w in self.writes],
        )


def _nothing(*_: Any) -> tuple[()]:
    return ()


class Direct:
    """One call of tensors with one result, as it was recorded."""

    def __init__(self, call: Call) -> None:
        self._function, self._args, self._kwargs = call.function, list(call.args), call.kwargs
        self._given = [(at, one.number) for at, one in enumerate(call.args) if isinstance(one, Slot)]
        self._result = call.results[0].number

    @classmethod
    def of(cls, call: Call) -> Direct | None:
        """None: its tensors are in lists or have names, or it may return other than one tensor."""
        plain = [one for one in call.args if isinstance(one, Slot)] == tensors_of((call.args, call.kwargs))
        return cls(call) if plain and call.function in _OF_ONE_RESULT else None

    def __call__(self, values: list[Any], _cache: Any) -> None:
        args = self._args.copy()
        for at, number in self._given:
            args[at] = values[number]
        values[self._result] = self._function(*args, **self._kwargs)


class Step:
    """A segment's function, with the numbers of what it takes and leaves in a room and in the cache."""

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
