"""Reads the experts of a checkpoint one by one, through transformers' own conversion mapping.

Checkpoints name and shape experts in many ways; transformers knows them all and turns them into fused
parameters when it loads a model. Loading would hold a whole layer (or model) in memory. We ask the same
converters for one expert at a time: the position of a tensor, in natural order, among those that a
converter collects for one parameter is its expert's number, and a converter that is given one tensor
instead of all returns exactly that expert's slice. No table of names of our own.

fp8 and mxfp4 checkpoints come with a quantizer of transformers' own, which puts a dequantising step in
front of those converters; what is read then is what `from_pretrained(..., dequantize=True)` loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
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
    rename_source_key,
)

from melinoe.errors import MelinoeError
from melinoe.moe import experts_modules
from melinoe.offload.shards import Outgoing, Shards

Groups = dict[str, list[str]]  # {source pattern of a converter: names of stored tensors, in natural order}


@dataclass
class Sources:
    """What one parameter is made of. converter None: it is stored as it is, under another name at most."""

    converter: WeightConverter | None
    groups: Groups = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for group in self.groups.values() for name in group]


def skeleton(source: Path | str) -> nn.Module:
    """The model of a checkpoint on the meta device: shapes and names, no weights."""
    config = AutoConfig.from_pretrained(source)
    if hasattr(config, "quantization_config"):  # a checkpoint's own; experts are modelled as they are computed
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)


def own_quantizer(source: Path | str) -> Any | None:
    """transformers' quantizer of a quantised checkpoint, set to dequantise; None for a plain one.

    Raises:
        MelinoeError: a method that cannot be undone while loading.
    """
    config = AutoConfig.from_pretrained(source)
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    from transformers.quantizers.auto import AutoHfQuantizer

    settings = dict(settings if isinstance(settings, dict) else settings.to_dict())
    method = settings.get("quant_method")
    try:
        quantizer = AutoHfQuantizer.from_config({**settings, "dequantize": True}, pre_quantized=True)
        operations = quantizer.get_load_operations()
    except Exception as error:
        raise MelinoeError(f"cannot read a checkpoint quantised by {method}", got=error) from None
    if "dequantize" not in operations or not getattr(quantizer.quantization_config, "dequantize", False):
        raise MelinoeError(
            "a checkpoint whose quantisation cannot be undone while it is read",
            got=method,
            allowed="fp8 and mxfp4",
            next_step="convert the model it was made from, with --format for smaller experts",
        )
    return quantizer


def _dequantises(step: Any) -> bool:
    return getattr(step, "hf_quantizer", None) is not None


def _separable(converter: WeightConverter) -> bool:
    """Whether every step treats each expert by itself (dimension 0 is the experts')."""
    return all(
        _dequantises(step)
        or (type(step) is MergeModulelist and step.dim == 0)
        or (type(step) in (Concatenate, Interleave) and step.dim >= 1)
        or (type(step) is Transpose and min(step.dim0, step.dim1) >= 1 and not step.check_dims)
        for step in converter.operations
    )


class Checkpoint:
    """A checkpoint folder: the model's skeleton, its shards, and which tensors make which parameter.

    Raises:
        MelinoeError: see `Shards` and `own_quantizer`; or the checkpoint lacks tensors of an expert parameter.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.quantizer = own_quantizer(folder)
        self.model = skeleton(folder)
        self.shards = Shards(folder)
        self.experts: dict[str, Sources] = {}  # {parameter: sources}
        self.resident: dict[str, Sources] = {}  # the same for everything else, known to the model or not
        self._plan()
        self._whole: tuple[str, torch.Tensor] | None = None  # last parameter that could not be separated

    def _plan(self) -> None:
        conversions = get_model_conversion_mapping(self.model, None, self.quantizer)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        targets = {
            f"{name}.{parameter}"
            for name, module in experts_modules(self.model)
            for parameter, _ in module.named_parameters(recurse=False)
        }
        for name in self.shards.names():
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = rename_source_key(name, [], [], prefix, state)
            found = self.experts if target in targets else self.resident
            converter = by_pattern.get(pattern) if pattern else None
            found.setdefault(target, Sources(converter)).groups.setdefault(pattern or name, []).append(name)
        missing = sorted(targets - set(self.experts))
        if missing:
            raise MelinoeError("the checkpoint lacks expert weights", got=f"nothing for {missing[0]}")

    def inseparable(self) -> dict[str, int]:
        """{expert parameter: its bytes} of those that a converter can only make for all experts together."""
        return {
            target: self.model.get_parameter(target).nbytes
            for target, sources in self.experts.items()
            if sources.converter is not None and not _separable(sources.converter)
        }

    def expert_tensor(self, target: str, expert: int, num_experts: int) -> torch.Tensor:
        """One expert of one parameter, without the expert dimension, in the model's dtype."""
        sources, parameter = self.experts[target], self.model.get_parameter(target)
        converter = sources.converter
        if converter is None:  # stored fused
            [name] = sources.names
            return self.shards.rows(name, expert, expert + 1)[0].to(parameter.dtype)
        if not _separable(converter):
            if self._whole is None or self._whole[0] != target:
                self._whole = None  # free the last one first
                self._whole = (target, self._convert(target, sources, self.shards.tensor, sources.groups))
            return self._whole[1][expert]
        per_expert = {p: len(group) == num_experts and num_experts > 1 for p, group in sources.groups.items()}
        one = {p: [group[expert] if per_expert[p] else group[0]] for p, group in sources.groups.items()}
        fused_names = {group[0] for p, group in sources.groups.items() if not per_expert[p]}

        def read(name: str) -> torch.Tensor:
            if name in fused_names:
                return self.shards.rows(name, expert, expert + 1)
            return self.shards.tensor(name)

        fused = self._convert(target, sources, read, one)
        assert fused.shape == (1, *parameter.shape[1:]), (target, fused.shape, parameter.shape)
        return fused[0]

    def _convert(
        self, target: str, sources: Sources, read: Callable[[str], torch.Tensor], groups: Groups
    ) -> torch.Tensor:
        """Runs a parameter's converter on the tensors named in `groups`, each read when it is needed."""
        converter = deepcopy(sources.converter)
        assert converter is not None
        dtype = self.model.get_parameter(target).dtype
        # a dequantising step takes codes and scales as they are
        raw = any(_dequantises(step) for step in converter.operations)
        for pattern, names in groups.items():
            for name in names:
                future = (lambda name=name: read(name)) if raw else (lambda name=name: read(name).to(dtype))
                converter.add_tensor(target, name, pattern, future)
        result = converter.convert(target, model=self.model, config=self.model.config)[target]
        return (result[0] if isinstance(result, list) else result).detach()

    def resident_tensor(self, target: str) -> torch.Tensor:
        """A parameter or buffer of the model that is no expert's, as loading would make it, in its own dtype.

        Raises:
            MelinoeError: the checkpoint does not hold it.
        """
        sources = self.resident.get(target)
        if sources is None:
            raise MelinoeError("the checkpoint lacks weights", got=f"nothing for {target}")
        if sources.converter is None:
            return self.shards.tensor(sources.names[0])
        return self._convert(target, sources, self.shards.tensor, sources.groups)

    def outgoing(self, replace: dict[str, torch.Tensor] | None = None) -> Iterator[Outgoing]:
        """What a store's resident file holds: every tensor that is no expert's, under the checkpoint's own name.

        Codes and scales of a quantised checkpoint become the weight that they stand for.

        Args:
            replace: {parameter: value} to write in place of what is stored.
        """
        replace = replace or {}
        for target, sources in self.resident.items():
            steps = sources.converter.operations if sources.converter is not None else []
            if target in replace:
                if len(sources.names) != 1:
                    raise MelinoeError(f"{target} is stored in pieces and cannot be replaced")
                value = replace[target]
                yield Outgoing(sources.names[0], value.dtype, tuple(value.shape), lambda value=value: value)
            elif steps and _dequantises(steps[0]) and len(sources.names) > 1:
                yield from self._dequantised(target, sources)
            else:
                for name in sources.names:
                    stored = self.shards.tensors[name]
                    yield Outgoing(
                        name, stored.dtype, stored.shape, lambda name=name: self.shards.tensor(name)
                    )

    def _dequantised(self, target: str, sources: Sources) -> Iterator[Outgoing]:
        """The weights of a target before its other steps: shapes are found by running the step on meta tensors."""
        assert sources.converter is not None
        step, first = sources.converter.operations[0], sources.converter.source_patterns[0]

        def run(read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
            given = {pattern: [read(name) for name in names] for pattern, names in sources.groups.items()}
            result = step.convert(given, model=self.model, full_layer_name=target, config=self.model.config)
            made = {}
            for key, value in result.items():  # under the weight's pattern, or under the target where it is one
                names = sources.groups.get(key, sources.groups[first])
                made |= dict(zip(names, value if isinstance(value, list) else [value], strict=True))
            return made

        def empty(name: str) -> torch.Tensor:
            stored = self.shards.tensors[name]
            return torch.empty(stored.shape, dtype=stored.dtype, device="meta")

        for name, tensor in run(empty).items():
            make = lambda name=name: run(self.shards.tensor)[name].detach()  # noqa: E731
            yield Outgoing(name, tensor.dtype, tuple(tensor.shape), make)
