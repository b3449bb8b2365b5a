"""What a recorded step depends on, besides what is in it: compared at the start of each generation.

Whatever somebody may change between two generations, so that the model would do something else: weights,
modules and their classes, what stands in their attributes (an adapter's name, its scale, a function put in
another's place), the config, attention, torch's settings, and the functions of the files that the modules'
classes come from. What those call in other files is not looked at.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Set
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from melinoe.decoding.watching import unwatched

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_DEEP = 4  # containers inside of each other; what is further in is compared by identity
# of every module: its tensors and modules are compared one by one, its hooks make it eager
_OF_ALL = frozenset(vars(nn.Module())) - {"training"}


class _Same:
    """Equal to what holds the same object; it keeps none alive (a decoder would keep its own model)."""

    def __init__(self, value: Any) -> None:
        self._id = id(value)
        try:
            self._value: Any = weakref.ref(value)
        except TypeError:
            self._value = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self._id != other._id:
            return False
        return self._value is None or self._value() is not None

    __hash__ = None  # type: ignore[assignment]


def state_of(model: Any, inputs: dict[str, Any], sticky: Any) -> Any:
    """To be compared with that of another time.

    Args:
        inputs: of a generation's first step. sticky: the model's sticky routers, or None.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    with unwatched():
        modules = list(model.modules())
        kinds = {type(module) for module in modules}
        files = {kind.__module__ for kind in kinds}
        return (
            [_tensor(tensor) for tensor in (*model.parameters(), *model.buffers())],
            [(_Same(module), _Same(type(module)), _attributes(module)) for module in modules],
            [
                _Same(kind.forward)
                for kind in sorted(kinds, key=lambda one: (one.__module__, one.__qualname__))
            ],
            [(file, _functions(file)) for file in sorted(files)],
            _kept(vars(config)),
            config._experts_implementation,
            _Same(ALL_ATTENTION_FUNCTIONS.get(attention)),
            _Same(ALL_MASK_ATTENTION_FUNCTIONS.get(attention)),
            torch._C._get_mkldnn_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_num_threads(),
            tuple(inputs),
            id(sticky),
        )


def _tensor(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: _kept(value) for name, value in vars(module).items() if name not in _OF_ALL}


def _functions(file: str) -> dict[str, _Same]:
    found = vars(sys.modules[file]) if file in sys.modules else {}
    return {name: _Same(value) for name, value in found.items() if type(value) is FunctionType}


def _kept(value: Any, depth: int = _DEEP) -> Any:
    """What stays as it is when the value changes: containers are copied, others compared by identity."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if depth > 0 and isinstance(value, Mapping):
        return type(value), [(_kept(key, depth - 1), _kept(one, depth - 1)) for key, one in value.items()]
    if depth > 0 and isinstance(value, (list, tuple)):
        return type(value), [_kept(one, depth - 1) for one in value]
    if depth > 0 and isinstance(value, Set):
        return type(value), sorted(map(repr, value))
    return _Same(value)
