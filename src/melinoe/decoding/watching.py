"""What stands in the place of others' functions while a step is recorded, in the thread that records."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import nn
from transformers import masking_utils
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Listener(Protocol):
    """Who is told, and calls what was to be called (`Recorder`)."""

    def refuse(self, reason: str) -> None: ...

    def event(self, kind: str, function: Any, args: Any, kwargs: Any) -> Any: ...

    def attention(self, function: Any, args: Any, kwargs: Any) -> Any: ...

    def update(self, cache: Cache, key: Any, value: Any, layer_idx: int, more: Any, named: Any) -> Any: ...


class WatchedCache:
    """Stands before the cache while a step is recorded: lets `update` through and nothing else."""

    def __init__(self, recorder: Listener, cache: Cache) -> None:
        self.__dict__.update(_recorder=recorder, _cache=cache)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # for isinstance
        return type(self._cache)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *more: Any, **named: Any) -> Any:
        return self._recorder.update(self._cache, key, value, layer_idx, more, named)

    def __getattr__(self, name: str) -> Any:
        self._recorder.refuse(f"uses {name} of its cache")
        return getattr(self._cache, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._recorder.refuse(f"sets {name} of its cache")
        setattr(self._cache, name, value)

    def __len__(self) -> int:
        self._recorder.refuse("asks for the length of its cache")
        return len(self._cache)


_WATCHING = threading.Lock()


def unwatched() -> AbstractContextManager[Any]:
    """Inside of it no thread has put anything in the place of others' functions."""
    return _WATCHING


@contextmanager
def watched_by(recorder: Listener, model: nn.Module, experts: list[nn.Module]) -> Iterator[None]:
    """What this thread asks for of masks, attention and experts is an event of the listener."""
    me = threading.get_ident()
    get_interface = ALL_ATTENTION_FUNCTIONS.get_interface

    def attention(name: Any, default: Any) -> Any:
        function = get_interface(name, default)
        if threading.get_ident() != me:
            return function
        return lambda *args, **kwargs: recorder.attention(function, args, kwargs)

    def mask(function: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != me:
                return function(*args, **kwargs)
            return recorder.event("mask", function, args, kwargs)

        return watched

    def method(kind: str, function: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != me:
                return function(*args, **kwargs)
            return recorder.event(kind, function, args, kwargs)

        return watched

    with _WATCHING, ExitStack() as undo:
        ALL_ATTENTION_FUNCTIONS.get_interface = attention  # type: ignore[method-assign]
        undo.callback(ALL_ATTENTION_FUNCTIONS.__dict__.pop, "get_interface")
        for file in {type(one).__module__ for one in model.modules()}:
            for name, function in list(vars(sys.modules[file]).items()):
                if type(function) is FunctionType and function.__module__ == masking_utils.__name__:
                    setattr(sys.modules[file], name, mask(function))
                    undo.callback(setattr, sys.modules[file], name, function)
        expanding = [
            (one, "expand_kv", "expand") for one in model.modules() if hasattr(type(one), "expand_kv")
        ]
        for one, name, kind in [*((one, "forward", "experts") for one in experts), *expanding]:
            original = getattr(one, name)
            if name in vars(one):
                undo.callback(setattr, one, name, original)
            else:
                undo.callback(vars(one).pop, name)
            setattr(one, name, method(kind, original))
        yield
