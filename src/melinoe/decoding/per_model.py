"""One object for each model, which lives as long as the model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

T = TypeVar("T")


class PerModel(Generic[T]):
    """Called with a model, it gives the model's own object, made when it is first asked for.

    Args:
        make: what makes it of a model; what it makes must not hold the model.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make
        self._made: weakref.WeakKeyDictionary[nn.Module, T] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def __call__(self, model: Any) -> T:
        with self._lock:
            if model not in self._made:
                self._made[model] = self._make(model)
            return self._made[model]
