"""A checkpoint, opened once: its model without weights, its MoE layers, its files, and which tensor is what.

Checkpoints name and shape experts in many ways; transformers knows them all, and we ask its own conversion
mapping (parameter.py reads through it). No table of names of our own. A checkpoint that is quantised in a
format transformers can undo on any machine (fp8 with block scales, mxfp4) passes through the dequantiser that
transformers puts in front of its converters.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import AutoHfQuantizer

from melinoe.conversion.parameter import ExpertParameter
from melinoe.errors import MelinoeError
from melinoe.models.folder import local_folder, resolve_model
from melinoe.models.identity import Identity, resident_identity, row_length
from melinoe.models.layers import (
    MoeLayer,
    check_experts_per_token,
    experts_per_token,
    fingerprint,
    moe_layers,
    own_parameters,
)
from melinoe.models.pretrained import skeleton
from melinoe.models.weights import weight_files
from melinoe.store.shards import Shards

DEQUANTISABLE = ("fp8", "mxfp4")  # what transformers turns back into plain weights on any machine


class Checkpoint:
    """A mixture-of-experts checkpoint. Nothing of its weights has been read.

    Attributes:
        folder: where it is.
        source: how it was asked for: a folder, a Hub id or `tiny`.
        model: the model on the meta device: shapes and names. Its routers get weights by `load_routers`.
        layers: its MoE layers, in order.

    Raises:
        MelinoeError: a dense model.
    """

    def __init__(self, folder: Path, source: str | Path | None = None) -> None:
        self.folder, self.source = folder, str(folder if source is None else source)
        self.model = skeleton(folder)
        self.layers: list[MoeLayer] = moe_layers(self.model)
        check_experts_per_token(self.model, max(layer.num_experts for layer in self.layers))

    @classmethod
    def open(cls, source: str | Path | Checkpoint, *, weights: bool = True) -> Checkpoint:
        """Opens a model folder, Hub id or `tiny`; what is open already is returned as it is.

        Args:
            weights: fetch those of a Hub id; without them there may be no `shards`.

        Raises:
            MelinoeError: no such model, or a dense one.
        """
        if isinstance(source, Checkpoint):
            return source
        return cls(local_folder(resolve_model(source), weights), source)

    @property
    def shape(self) -> dict[str, int]:
        """Layers, experts and top-k of the mixture."""
        return {
            "num_layers": len(self.layers),
            "num_experts": self.layers[0].num_experts,
            "experts_per_token": experts_per_token(self.model),
        }

    @cached_property
    def shards(self) -> Shards:
        """Its safetensors files.

        Raises:
            MelinoeError: it has none that `from_pretrained` would read, or a file is damaged.
        """
        return Shards(weight_files(self.folder, self.model.config))

    @cached_property
    def quantizer(self) -> Any:
        """transformers' HfQuantizer that turns a quantised checkpoint into a plain one; None: it is plain.

        Raises:
            MelinoeError: quantised in a format that we cannot stream.
        """
        given = getattr(self.model.config, "quantization_config", None)
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

    def parameters(self, layer: MoeLayer) -> dict[str, ExpertParameter]:
        """The parameters of a layer's experts module, in the order of its record."""
        found, _ = self._tensors
        return {name: found[f"{layer.experts_name}.{name}"] for name, _ in own_parameters(layer.experts)}

    def expert(self, layer: MoeLayer, expert: int) -> dict[str, torch.Tensor]:
        """The tensors of one expert, by parameter name, without the expert dimension."""
        return {name: parameter.tensor(expert) for name, parameter in self.parameters(layer).items()}

    def resident(self) -> dict[str, str]:
        """What is not an expert's.

        Returns:
            {tensor of the checkpoint: its name in the model, "" where it is not taken as it is}
        """
        return self._tensors[1]

    @cached_property
    def _tensors(self) -> tuple[dict[str, ExpertParameter], dict[str, str]]:
        """Which tensors of the checkpoint make which expert parameter, and which are not experts'.

        Raises:
            MelinoeError: the checkpoint lacks tensors of an expert parameter.
        """
        conversions = get_model_conversion_mapping(self.model, None, self.quantizer)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        targets = {
            f"{layer.experts_name}.{field}": layer.num_experts
            for layer in self.layers
            for field, _ in own_parameters(layer.experts)
        }
        found: dict[str, ExpertParameter] = {}
        rest = {}
        for name in self.shards.names():
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = rename_source_key(name, [], [], prefix, state)
            if target in targets:
                converter = by_pattern.get(pattern) if pattern else None
                parameter = found.setdefault(
                    target, ExpertParameter(self.model, self.shards, target, targets[target], converter, {})
                )
                parameter.sources.setdefault(pattern or name, []).append(name)
            elif target in state:
                rest[name] = "" if pattern else target
            # else the model has no use for it, such as the layers that predict several tokens
        missing = sorted(set(targets) - set(found))
        if missing:
            raise MelinoeError("the checkpoint lacks expert weights", got=f"nothing for {missing[0]}")
        return found, rest

    @torch.no_grad()
    def load_routers(self, shards: Shards | None = None) -> str:
        """Gives the routers of `model` their weights: enough for its fingerprint.

        Args:
            shards: of a store that was written from this checkpoint, under its names; None: its own.

        Returns:
            "", or the first tensor of a router that is not held as it is.
        """
        shards = shards or self.shards
        stored = {target: name for name, target in self.resident().items() if target}
        for layer in self.layers:
            tensors = {}
            for name, value in layer.router.state_dict().items():
                full = f"{layer.router_name}.{name}"
                if full not in stored or shards.entries[stored[full]].shape != tuple(value.shape):
                    return full
                tensors[name] = shards.tensor(stored[full]).to(value.dtype)
            layer.router.load_state_dict(tensors, assign=True)
        return ""

    def fingerprint(self, shards: Shards | None = None) -> str:
        """The fingerprint of the routing, from the routers in `shards` (see `load_routers`).

        Returns:
            "" where they are not held as they are.
        """
        return "" if self.load_routers(shards) else fingerprint(self.model)

    def identity(self) -> Identity:
        """Which weights it has beside its experts, of those parts that it holds as they are."""
        stored = {target: name for name, target in self.resident().items() if target}

        def beginning_of(name: str, parameter: torch.nn.Parameter) -> torch.Tensor | None:
            entry = self.shards.entries.get(stored.get(name, ""))
            if entry is None or entry.shape != tuple(parameter.shape):
                return None
            return self.shards.start(stored[name], row_length(entry.shape)).to(parameter.dtype)

        return resident_identity(self.model, self.layers, beginning_of)
