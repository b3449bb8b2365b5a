"""What is not an expert: copied into the store's model.safetensors, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from melinoe.conversion.checkpoint import Checkpoint
from melinoe.errors import MelinoeError
from melinoe.store.shards import file_order, write_file


def write_resident(
    checkpoint: Checkpoint, path: Path, replaced: dict[str, torch.Tensor] | None = None
) -> None:
    """Writes the tensors that are not experts' under the checkpoint's own names.

    What a quantised checkpoint holds quantised is written in the model's dtype.

    Args:
        replaced: tensors that take the place of the checkpoint's, by the name in the checkpoint.

    Raises:
        MelinoeError: a quantised tensor that the quantizer's own names do not explain.
    """
    replaced = replaced or {}
    shards, rest, quantizer = checkpoint.shards, checkpoint.resident(), checkpoint.quantizer
    dtype = checkpoint.model.config.dtype
    scales = _scales(checkpoint)
    companions = set(scales.values())
    if quantizer is not None:  # scales of activations: a plain model has no use for them
        companions |= {name for name in rest if name.endswith(".activation_scale")}
    described = {}
    for name in rest:
        if name in companions:
            continue
        entry = shards.entries[name]
        kept = replaced[name].dtype if name in replaced else dtype if name in scales else entry.dtype
        if quantizer is not None and name not in scales and entry.dtype.itemsize == 1:
            raise MelinoeError(
                f"{name} is quantised, and the checkpoint holds no scale for it",
                got=str(entry.dtype),
                next_step="convert the checkpoint that this one was made from",
            )
        described[name] = (kept, entry.shape)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, (kept, _) in file_order(described).items():
            if name in replaced:
                yield name, replaced[name]
            elif name in scales:
                yield name, _dequantised(quantizer, shards.tensor(name), shards.tensor(scales[name])).to(kept)
            else:
                yield name, shards.tensor(name)

    write_file(path, file_order(described), tensors())


def _scales(checkpoint: Checkpoint) -> dict[str, str]:
    """{quantised tensor: its scale}, both by their names in the checkpoint."""
    if checkpoint.quantizer is None:
        return {}
    suffix = "_scale_inv"
    return {
        name.removesuffix(suffix): name
        for name in checkpoint.resident()
        if name.endswith(suffix) and name.removesuffix(suffix) in checkpoint.shards.entries
    }


def _dequantised(quantizer: Any, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """One weight through transformers' own dequantiser, rounded once (float32 where the scale is)."""
    if scale.dtype != torch.uint8:  # exponents as bytes are the dequantiser's own business
        scale = scale.float()
    step = quantizer.get_load_operations()["dequantize"](quantizer)
    [result] = step.convert({"weight": [weight], "weight_scale_inv": [scale]}).values()
    return result
