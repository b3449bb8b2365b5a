"""Models on the meta device, where tensors have shapes and no values: nothing fills them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_INIT = torch.nn.init.__name__


class _Uninitialised(TorchFunctionMode):
    """Leaves out torch.nn.init. On the meta device it runs in Python, by operators that import sympy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == _INIT:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_alone() -> Iterator[None]:
    """What is made inside is on the meta device, and its parameters are not initialised."""
    with torch.device("meta"), _Uninitialised():
        yield
