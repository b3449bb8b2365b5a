"""Reads the experts of a checkpoint one by one, through transformers' own conversion mapping.

Checkpoints name and shape experts in many ways; transformers knows them all and turns them into fused
parameters when it loads a model. Loading would hold a whole layer (or model) in memory. We ask the same
converters for one expert at a time: the position of a tensor, in natural order, among those that a
converter collects for one parameter is its expert's number, and a converter that is given one tensor
instead of all returns exactly that expert's slice. No table of names of our own.

A checkpoint that is quantised in a format transformers can undo on any machine (fp8 with block scales,
mxfp4) passes through the dequantiser that transformers puts in front of its converters.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.quantizers.auto import AutoHfQuantizer

from melinoe.errors import MelinoeError
from melinoe.models.layers import experts_modules, moe_layers, own_parameters
from melinoe.store.shards import Entry as Entry
from melinoe.store.shards import Shards as Shards

DEQUANTISABLE = ("fp8", "mxfp4")  # what transformers turns back into plain weights on any machine


def dequantizer(config: Any) -> Any:
    """transformers' HfQuantizer that turns a quantised checkpoint into plain weights; None for a plain one.

    Raises:
        MelinoeError: quantised in a format that we cannot stream.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    data = dict(given if isinstance(given, dict) else given.to_dict())
    if data.get("quant_method") not in DEQUANTISABLE:
        raise MelinoeError(
            "the checkpoint is quantised in a format that melinoe cannot stream",
            got=data.get("quant_method"),
            allowed=f"{', '.join(DEQUANTISABLE)}, or plain weights",
            next_step="convert the checkpoint it was made from",
        )
    return AutoHfQuantizer.from_config({**data, "dequantize": True}, pre_quantized=True)


# one parameter of an experts module: its converter (None: stored as it is) and the names it collects
Sources = tuple[WeightConverter | None, dict[str, list[str]]]


def plan(
    model: nn.Module, names: list[str], quantizer: Any = None
) -> tuple[dict[str, Sources], dict[str, str]]:
    """Which tensors of the checkpoint make which expert parameter, and which are not experts'.

    Args:
        quantizer: what `dequantizer` gave for the checkpoint.

    Returns:
        {expert parameter: its sources}, {other tensor of the model: its name there, "" where it is not taken
        as it is}.

    Raises:
        MelinoeError: the checkpoint lacks tensors of an expert parameter.
    """
    conversions = get_model_conversion_mapping(model, None, quantizer)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    targets = {
        f"{name}.{field}" for name, module in experts_modules(model) for field, _ in own_parameters(module)
    }
    found: dict[str, Sources] = {}
    rest = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target in targets:
            _, sources = found.setdefault(target, (by_pattern.get(pattern) if pattern else None, {}))
            sources.setdefault(pattern or name, []).append(name)
        elif target in state:  # others the model does not use, such as layers that predict several tokens
            rest[name] = "" if pattern else target
    missing = sorted(targets - set(found))
    if missing:
        raise MelinoeError("the checkpoint lacks expert weights", got=f"nothing for {missing[0]}")
    return found, rest


@torch.no_grad()
def load_routers(model: nn.Module, shards: Shards, rest: dict[str, str]) -> str:
    """Gives the routers of a skeleton their weights: enough for its fingerprint.

    Returns:
        "", or the first tensor of a router that the checkpoint does not hold as it is.
    """
    stored = {target: name for name, target in rest.items() if target}
    for layer in moe_layers(model):
        tensors = {}
        for name, value in layer.router.state_dict().items():
            full = f"{layer.router_name}.{name}"
            if full not in stored or shards.entries[stored[full]].shape != tuple(value.shape):
                return full
            tensors[name] = shards.tensor(stored[full]).to(value.dtype)
        layer.router.load_state_dict(tensors, assign=True)
    return ""


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


def run_converter(
    model: nn.Module, converter: WeightConverter, target: str, tensors: dict[str, list[torch.Tensor]]
) -> torch.Tensor:
    """What transformers makes of {source pattern: tensors} for one parameter."""
    one = deepcopy(converter)
    for pattern in list(tensors):
        for tensor in tensors.pop(pattern):  # the converter frees what it has used
            one.add_tensor(target, pattern, pattern, lambda tensor=tensor: tensor)
            del tensor
    result = one.convert(target, model=model, config=model.config)[target]
    return result[0] if isinstance(result, list) else result


def expert_tensors(
    model: nn.Module, shards: Shards, target: str, sources: Sources, num_experts: int
) -> Iterator[torch.Tensor]:
    """One parameter, expert by expert: tensors without the expert dimension, in the model's dtype."""
    converter, names = sources
    if converter is None or separable(converter):
        check_counts(shards, target, names, num_experts)
        for expert in range(num_experts):
            yield one_expert(model, shards, target, sources, num_experts, expert)
    else:  # an operation that mixes experts: one parameter of one layer in memory
        dtype = model.get_parameter(target).dtype
        whole = {
            p: [_given(converter, shards.tensor(name), dtype) for name in group] for p, group in names.items()
        }
        for one in run_converter(model, converter, target, whole):
            yield one.to(dtype)


def one_expert(
    model: nn.Module, shards: Shards, target: str, sources: Sources, num_experts: int, expert: int
) -> torch.Tensor:
    """One parameter of one expert, where the conversion can be separated by experts."""
    converter, names = sources
    dtype, shape = model.get_parameter(target).dtype, model.get_parameter(target).shape
    if converter is None:  # stored fused
        [name] = [name for group in names.values() for name in group]
        if shards.entries[name].shape != tuple(shape):
            raise MelinoeError(
                f"{name} has another shape than the model's config says",
                got=list(shards.entries[name].shape),
                allowed=list(shape),
                next_step="fetch the checkpoint again",
            )
        part = shards.part(name, expert, num_experts)
        return (part[0] if len(part) == 1 else part).to(dtype)  # several rows each: dbrx, [E * F, H]
    tensors = {}
    for pattern, group in names.items():
        own = per_expert(group, num_experts)
        tensor = shards.tensor(group[expert]) if own else shards.part(group[0], expert, num_experts)
        tensors[pattern] = [_given(converter, tensor, dtype)]
        del tensor
    fused = run_converter(model, converter, target, tensors)
    assert fused.shape == (1, *shape[1:]), (target, fused.shape, shape)
    return fused[0].to(dtype)


def _given(converter: WeightConverter, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a converter is given: the model's dtype, or what the dequantiser in front of it understands."""
    raw = any(_dequantizes(step) for step in converter.operations)
    return tensor if raw else tensor.to(dtype)


def per_expert(group: list[str], num_experts: int) -> bool:
    """Whether a pattern collects one tensor for each expert; else it collects one that holds all of them."""
    return len(group) == num_experts and num_experts > 1


def check_counts(shards: Shards, target: str, names: dict[str, list[str]], num_experts: int) -> None:
    """Refuses groups that are neither one tensor for each expert nor one tensor of all experts.

    The position in a group is the expert's number: with a tensor missing, experts would be mistaken for
    others.
    """
    for group in names.values():
        rows = shards.entries[group[0]].shape[0]
        if not per_expert(group, num_experts) and (len(group) != 1 or rows % num_experts):
            raise MelinoeError(
                f"the checkpoint does not hold every expert of {target}",
                got=f"{len(group)} tensors such as {group[0]}",
                allowed=f"{num_experts}, or one with {num_experts} rows",
                next_step="fetch the checkpoint again",
            )
