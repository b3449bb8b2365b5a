"""One parameter of an experts module, read from a checkpoint expert by expert.

transformers' converters turn a checkpoint's tensors into fused parameters when it loads a model, which would
hold a whole layer in memory. We ask the same converters for one expert at a time: the position of a tensor,
in natural order, among those that a converter collects for one parameter is its expert's number, and a
converter that is given one tensor instead of all returns exactly that expert's slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from melinoe.errors import MelinoeError
from melinoe.store.shards import Entry, Shards


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter and the tensors that make it; `tensors` reads them.

    Attributes:
        model: of the checkpoint, on the meta device.
        shards: of the checkpoint.
        name: of the parameter in the model.
        num_experts: E of its module.
        converter: what makes it; None: it is stored as it is.
        sources: {pattern: names in the checkpoint, in natural order} of what the converter collects.
    """

    model: nn.Module
    shards: Shards
    name: str
    num_experts: int
    converter: WeightConverter | None
    sources: dict[str, list[str]]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes; the checkpoint's tensors may have another one."""
        return self.model.get_parameter(self.name).dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.model.get_parameter(self.name).shape)

    def entries(self) -> list[list[Entry]]:
        """Where the tensors stand: one list for each pattern of `sources`."""
        return [[self.shards.entries[name] for name in group] for group in self.sources.values()]

    def has_one_each(self, group: list[str]) -> bool:
        """Whether a pattern collects one tensor for each expert; else it collects one that holds all."""
        return len(group) == self.num_experts and self.num_experts > 1

    def check_counts(self) -> None:
        """Refuses groups that are neither one tensor for each expert nor one tensor of all experts.

        The position in a group is the expert's number: with one missing, others would be mistaken for it.
        """
        for group in self.sources.values():
            rows = self.shards.entries[group[0]].shape[0]
            if not self.has_one_each(group) and (len(group) != 1 or rows % self.num_experts):
                raise MelinoeError(
                    f"the checkpoint does not hold every expert of {self.name}",
                    got=f"{len(group)} tensors such as {group[0]}",
                    allowed=f"{self.num_experts}, or one with {self.num_experts} rows",
                    next_step="fetch the checkpoint again",
                )

    def tensors(self) -> Iterator[torch.Tensor]:
        """Expert by expert: tensors without the expert dimension, in the model's dtype."""
        if self.converter is None or separable(self.converter):
            self.check_counts()
            for expert in range(self.num_experts):
                yield self.tensor(expert)
        else:  # an operation that mixes experts: one parameter of one layer in memory
            whole = {
                pattern: [self._given(self.shards.tensor(name)) for name in group]
                for pattern, group in self.sources.items()
            }
            for one in self.converted(whole):
                yield one.to(self.dtype)

    def tensor(self, expert: int) -> torch.Tensor:
        """The tensor of one expert, where the conversion can be separated by experts."""
        if self.converter is None:
            return self._part_of_fused(expert)
        tensors = {}
        for pattern, group in self.sources.items():
            tensor = (
                self.shards.tensor(group[expert])
                if self.has_one_each(group)
                else self.shards.part(group[0], expert, self.num_experts)
            )
            tensors[pattern] = [self._given(tensor)]
            del tensor
        fused = self.converted(tensors)
        self._check_shape(next(iter(self.sources.values()))[0], fused.shape[1:], self.shape[1:])
        return fused[0].to(self.dtype)

    def _part_of_fused(self, expert: int) -> torch.Tensor:
        [name] = [name for group in self.sources.values() for name in group]
        self._check_shape(name, self.shards.entries[name].shape, self.shape)
        part = self.shards.part(name, expert, self.num_experts)
        return (part[0] if len(part) == 1 else part).to(self.dtype)  # several rows each: dbrx, [E * F, H]

    def _check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if tuple(found) != expected:
            raise MelinoeError(
                f"{name} has another shape than the model's config says",
                got=f"{list(found)} for {self.name}",
                allowed=list(expected),
                next_step="fetch the checkpoint again",
            )

    def _given(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a converter is given: the model's dtype, or what a dequantiser in front of it understands."""
        assert self.converter is not None
        raw = any(_dequantizes(step) for step in self.converter.operations)
        return tensor if raw else tensor.to(self.dtype)

    def converted(self, tensors: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        """What transformers makes of {source pattern: tensors}.

        The dictionary is emptied on the way, so that the converter can free what it has used.
        """
        one = deepcopy(self.converter)
        assert one is not None
        for pattern in list(tensors):
            for tensor in tensors.pop(pattern):
                one.add_tensor(self.name, pattern, pattern, lambda tensor=tensor: tensor)
                del tensor
        result = one.convert(self.name, model=self.model, config=self.model.config)[self.name]
        return result[0] if isinstance(result, list) else result


def _dequantizes(step: Any) -> bool:
    return getattr(step, "hf_quantizer", None) is not None


def separable(converter: WeightConverter) -> bool:
    """Whether every step treats each expert by itself (dimension 0 is the experts')."""
    return all(
        (type(step) is MergeModulelist and step.dim == 0)
        or (type(step) in (Concatenate, Interleave) and step.dim >= 1)
        or (type(step) is Transpose and min(step.dim0, step.dim1) >= 1 and not step.check_dims)
        or _dequantizes(step)
        for step in converter.operations
    )
