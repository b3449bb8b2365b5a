"""What operators return on the meta device, worked out once for equal arguments.

torch works out many shapes in Python, a multiplication's in a tenth of a millisecond, and a model of sixty
layers asks for the same ones sixty times. Only of operators that return new tensors, and only where that is
seen: of views, and of what is written in place, every call is torch's.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

Found = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype


class KnownShapes:
    """Runs operators on tensors of the meta device; `asked` counts those that torch has worked out."""

    def __init__(self) -> None:
        self.asked = 0
        self._known: dict[Any, Found | None] = {}  # None: a view or several tensors, never kept

    def of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func(*args, **kwargs)` returns: a tensor of the same shape, strides and dtype."""
        key: Any = None
        with contextlib.suppress(TypeError):  # something that cannot be compared
            key = func, _key(args), tuple((name, _key(value)) for name, value in kwargs.items())
        known = self._known.get(key)
        if known is not None:
            shape, strides, dtype = known
            return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        self.asked += 1
        found = func(*args, **kwargs)
        if key is not None and key not in self._known:
            self._known[key] = _kept(func, found, (args, kwargs))
        return found


def _key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(_key(one) for one in value)
    hash(value)
    return type(value), value  # 1 and 1.0 and True are equal


def _kept(func: Any, found: Any, given: Any) -> Found | None:
    """The shape of a new tensor, of just its size; None of everything else."""
    plain = type(found) is torch.Tensor and found.device.type == "meta" and not found.requires_grad
    if not plain or func._schema.is_mutable or any(one.alias_info for one in func._schema.returns):
        return None
    there = found.untyped_storage()
    inputs = [one.untyped_storage() for one in tree_leaves(given) if isinstance(one, torch.Tensor)]
    again = torch.empty_strided(found.shape, found.stride(), dtype=found.dtype, device="meta")
    fresh = all(there._cdata != one._cdata for one in inputs)
    if not fresh or found.storage_offset() or again.untyped_storage().nbytes() != there.nbytes():
        return None
    return tuple(found.shape), found.stride(), found.dtype
