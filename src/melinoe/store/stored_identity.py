"""The identity of a store's experts (melinoe.models.identity), read from a few rows of their records."""

from __future__ import annotations

import torch

from melinoe.models.identity import Identity, digest, row_length, sampled_experts
from melinoe.store.layout import Field, torch_dtype
from melinoe.store.manifest import Store
from melinoe.store.shards import read_bytes


def stored_identity(store: Store) -> Identity:
    """{experts: digest} of every layer of a store.

    Rounded records are no longer what the checkpoint held: those layers have the digest that was written down
    when they were converted; in a store from before there was one, none.
    """
    found = {layer.experts_name: layer.identity for layer in store.layers}
    for index, layer in enumerate(store.layers):
        if layer.packing is None:
            found[layer.experts_name] = digest(
                _beginning(store, index, expert, field)
                for expert in sampled_experts(index, layer.num_experts)
                for field in layer.layout.fields
            )
    return {name: one for name, one in found.items() if one}


def _beginning(store: Store, index: int, expert: int, field: Field) -> torch.Tensor:
    """The start of one tensor of an expert, from a record file or from the pieces of an in-place store."""
    layer, dtype = store.layers[index], torch_dtype(field.dtype)
    missing = row_length(field.shape) * dtype.itemsize
    if not layer.sources:
        return read_bytes(store.path(index), layer.offset(expert) + field.offset, missing).view(dtype)
    parts, position = [], field.offset
    for (place, length), (shard, start) in zip(layer.pieces, layer.sources[expert], strict=True):
        if place == position and missing > 0:  # pieces are in the order of the record
            taken = min(missing, length)
            parts.append(read_bytes(store.folder / store.shards[shard].file, start, taken))
            missing, position = missing - taken, position + taken
    return torch.cat(parts).view(dtype)
