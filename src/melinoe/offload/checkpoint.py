"""Reads the experts of a checkpoint one by one, through transformers' own conversion mapping.

Checkpoints name and shape experts in many ways; transformers knows them all and turns them into fused
parameters when it loads a model. Loading would hold a whole layer (or model) in memory. We ask the same
converters for one expert at a time: the position of a tensor, in natural order, among those that a
converter collects for one parameter is its expert's number, and a converter that is given one tensor
instead of all returns exactly that expert's slice. No table of names of our own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from melinoe.errors import MelinoeError
from melinoe.moe import experts_modules


def skeleton(source: Path | str) -> nn.Module:
    """The model of a checkpoint on the meta device: shapes and names, no weights."""
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)


class Shards:
    """The tensors of a checkpoint folder, by name, read when asked for."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif (folder / "model.safetensors").is_file():
            names = ["model.safetensors"]
        else:
            raise MelinoeError(
                f"{folder} holds no safetensors weights", allowed="model.safetensors or its index"
            )
        self.files = [folder / name for name in names]
        self._where: dict[str, Any] = {}
        for file in self.files:
            try:
                handle = safe_open(file, framework="pt", device="cpu")
            except Exception as error:
                raise MelinoeError(
                    f"cannot read {file}", got=error, next_step="fetch the checkpoint again"
                ) from None
            for key in handle.keys():  # noqa: SIM118 - not a dict
                self._where[key] = handle

    def names(self) -> list[str]:
        """All names; numbers inside them in natural order."""
        return sorted(self._where, key=dot_natural_key)

    def slice(self, name: str) -> Any:
        return self._where[name].get_slice(name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._where[name].get_tensor(name)


# one parameter of an experts module: its converter (None: stored as it is) and the names it collects
Sources = tuple[WeightConverter | None, dict[str, list[str]]]


def plan(model: nn.Module, names: list[str]) -> tuple[dict[str, Sources], list[str]]:
    """Which tensors of the checkpoint make which expert parameter, and which are not experts'.

    Raises:
        MelinoeError: the checkpoint lacks tensors of an expert parameter.
    """
    conversions = get_model_conversion_mapping(model, None, None)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    targets = {
        f"{name}.{field}" for name, module in experts_modules(model) for field, _ in own_parameters(module)
    }
    found: dict[str, Sources] = {}
    rest = []
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target in targets:
            _, sources = found.setdefault(target, (by_pattern.get(pattern) if pattern else None, {}))
            sources.setdefault(pattern or name, []).append(name)
        else:
            rest.append(name)
    missing = sorted(targets - set(found))
    if missing:
        raise MelinoeError("the checkpoint lacks expert weights", got=f"nothing for {missing[0]}")
    return found, rest


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def _separable(converter: WeightConverter) -> bool:
    """Whether every step treats each expert by itself (dimension 0 is the experts')."""
    return all(
        (type(step) is MergeModulelist and step.dim == 0)
        or (type(step) in (Concatenate, Interleave) and step.dim >= 1)
        or (type(step) is Transpose and min(step.dim0, step.dim1) >= 1 and not step.check_dims)
        for step in converter.operations
    )


def expert_tensors(
    model: nn.Module, shards: Shards, target: str, sources: Sources, num_experts: int
) -> Iterator[torch.Tensor]:
    """One parameter, expert by expert: tensors without the expert dimension, in the model's dtype."""
    converter, names = sources
    parameter = model.get_parameter(target)

    def convert(tensors: dict[str, list[tuple[str, torch.Tensor]]]) -> torch.Tensor:
        one = deepcopy(converter)
        assert one is not None
        for pattern, pairs in tensors.items():
            for name, tensor in pairs:
                one.add_tensor(target, name, pattern, lambda tensor=tensor: tensor)
        result = one.convert(target, model=model, config=model.config)[target]
        return result[0] if isinstance(result, list) else result

    if converter is None:  # stored fused
        [name] = [name for group in names.values() for name in group]
        stored = shards.slice(name)
        rows = stored.get_shape()[0] // num_experts  # more than one: dbrx, [E * F, H]
        for expert in range(num_experts):
            one = stored[expert] if rows == 1 else stored[expert * rows : (expert + 1) * rows]
            yield one.to(parameter.dtype)
    elif _separable(converter):
        for expert in range(num_experts):
            tensors = {}
            for pattern, group in names.items():
                if len(group) == num_experts and num_experts > 1:
                    tensors[pattern] = [(group[expert], shards.tensor(group[expert]).to(parameter.dtype))]
                else:
                    stored = shards.slice(group[0])
                    tensors[pattern] = [(group[0], stored[expert : expert + 1].to(parameter.dtype))]
            fused = convert(tensors)
            assert fused.shape == (1, *parameter.shape[1:]), (target, fused.shape, parameter.shape)
            yield fused[0]
    else:  # an operation that mixes experts: one parameter of one layer in memory
        fused = convert(
            {
                p: [(name, shards.tensor(name).to(parameter.dtype)) for name in group]
                for p, group in names.items()
            }
        )
        yield from fused
