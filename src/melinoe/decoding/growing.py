"""Keys and values that grow by one token, in memory with room for more.

`DynamicLayer.update` concatenates, and so copies a layer's whole cache for every token. Here the new ones are
written behind the old ones, into memory that nobody has seen yet, and the layer is given a longer view: the
numbers are those that concatenating gives. What the layer held before stays as it was, whoever holds it. Keys
that are not the last view that was made here (the cache was cropped, exchanged, or copied) are copied first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from transformers.cache_utils import DynamicLayer

from melinoe.decoding.operators import native
from melinoe.decoding.recorded import Call, Read, Slot, Write, map_tensors, tensors_of

ROOM = 32  # tokens: of a layer's memory, what is not used yet at most
_ALIGNED = 64  # bytes: heads begin where they would in keys of their own
_NAME = "_melinoe_growing"


class _Growing:
    """Memory for keys or values [1, H, room, D], and what the layer was given of it last.

    shape: of what is added for a token. left: tokens for which there is room.
    """

    def __init__(self, old: torch.Tensor) -> None:
        _, heads, tokens, width = old.shape
        self.memory = old.new_empty(1, heads, tokens + ROOM, width)
        self.memory[:, :, :tokens] = old
        self.last, self.shape, self.left = old, torch.Size((1, heads, 1, width)), ROOM

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """No address is held on to: a copy of this has memory of its own."""
        memory, tokens, library = self.memory, self.last.shape[2], native()
        if library is not None and new.is_contiguous():
            row = memory.shape[3] * memory.element_size()
            at = memory.data_ptr() + tokens * row
            library.melinoe_write_behind(at, new.data_ptr(), memory.shape[1], row, memory.shape[2] * row)
        else:
            memory.narrow(2, tokens, 1).copy_(new)
        self.left -= 1
        self.last = memory.narrow(2, 0, tokens + 1)
        return self.last


def append(layer: Any, name: str, new: torch.Tensor) -> torch.Tensor:
    """What `layer.name = torch.cat([layer.name, new], dim=-2)` gives, for one token; sets it."""
    old, growing = getattr(layer, name), vars(layer).get(_NAME)
    one: _Growing | None = growing.get(name) if growing is not None else None
    if one is None or one.last is not old or not one.left or one.shape != new.shape:
        if not fits(layer, name, new):
            found = torch.cat([old, new], dim=-2)
            setattr(layer, name, found)
            return found
        # a dictionary of its own: a copy of the layer may have this one
        one = _Growing(old)
        setattr(layer, _NAME, {**(growing or {}), name: one})
    found = one.append(new)
    setattr(layer, name, found)
    return found


def fits(layer: Any, name: str, new: torch.Tensor) -> bool:
    """Whether a layer's keys or values can grow so: one token of a plain cache, whose rows begin alike."""
    old = getattr(layer, name, None)
    return (
        type(layer) is DynamicLayer
        and isinstance(old, torch.Tensor)
        and old.dim() == new.dim() == 4
        and old.shape[0] == new.shape[0] == new.shape[2] == 1
        and old.shape[1::2] == new.shape[1::2]
        and old.dtype == new.dtype
        and old.device.type == "cpu"
        and not (old.requires_grad or new.requires_grad)
        and old.shape[3] * old.element_size() % _ALIGNED == 0
    )


@dataclass(frozen=True)
class Append:
    """layers[layer].name grows by the tensor of a slot, and is that of another then."""

    layer: int
    name: str
    new: Slot
    result: Slot

    def __call__(self, values: list[Any], cache: Any) -> None:
        values[self.result.number] = append(cache.layers[self.layer], self.name, values[self.new.number])


def appends(
    items: list[Any], users_of: dict[Slot, list[Call]], values: dict[Slot, torch.Tensor]
) -> tuple[list[Any], list[Append], list[Any]]:
    """Concatenations of a cache's tensors with new ones that are written back; the items before, and behind.

    There are none where something else looks at what the cache held, or writes besides; or where anything but
    sdpa's own kernel looks at the result: another might copy what does not lie in one piece, or multiply it
    otherwise.

    Args:
        users_of: the calls of the whole step that are given a slot. values: what was recorded.
    """
    reads = {item.slot: item for item in items if isinstance(item, Read)}
    writes = {item.slot: item for item in items if isinstance(item, Write)}
    found, gone = [], []
    for call in items:
        made = _of(call, reads, writes) if isinstance(call, Call) else None
        if made is not None:
            found.append(made)
            gone += [call, reads[call.args[0][0]], writes[made.result]]
    left = [not any(item is one for one in gone) for item in items]
    rest = [item for item, stays in zip(items, left, strict=True) if stays]
    before = left.index(False) if found else 0
    grown = {one.result for one in found}
    users = [user for slot in grown for user in users_of.get(slot, [])]
    here = all(any(user is item for item in rest) and _by_own_kernel(user, values) for user in users)
    inside = {slot for item in rest[before:] if isinstance(item, Call) for slot in item.results}
    if not here or inside & {one.new for one in found} or any(isinstance(one, (Read, Write)) for one in rest):
        return [], [], items
    return rest[:before], found, rest[before:]


def users_of(recorded: list[Any]) -> dict[Slot, list[Call]]:
    """The calls that are given a slot, of all items of a step."""
    found: dict[Slot, list[Call]] = {}
    for call in recorded:
        for slot in tensors_of((call.args, call.kwargs)) if isinstance(call, Call) else ():
            found.setdefault(slot, []).append(call)
    return found


def _by_own_kernel(call: Call, values: dict[Slot, torch.Tensor]) -> bool:
    """Whether a call is sdpa by its own kernel, which reads keys and values by their strides."""
    if call.function is not torch.nn.functional.scaled_dot_product_attention:
        return False
    args, kwargs = map_tensors((call.args, call.kwargs), values.__getitem__)
    return int(torch._fused_sdp_choice(*args, **kwargs)) == SDPBackend.FLASH_ATTENTION.value


def _of(call: Call, reads: dict[Slot, Read], writes: dict[Slot | None, Write]) -> Append | None:
    more = (*call.args[1:], *call.kwargs.values())
    if call.function is not torch.cat or more != (-2,) or set(call.kwargs) - {"dim"}:
        return None
    if not isinstance(call.args[0], (list, tuple)) or len(call.args[0]) != 2:
        return None
    (old, new), result = call.args[0], call.results[0]
    read, write = reads.get(old), writes.get(result)
    if read is None or write is None or new in reads or (read.layer, read.name) != (write.layer, write.name):
        return None
    return Append(read.layer, read.name, new, result)
