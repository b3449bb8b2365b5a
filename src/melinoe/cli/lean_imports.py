"""torch and transformers without what they import for compilers and for several processes.

Half of transformers' import is not its own: to mark a few functions for `torch.compile` it imports all of
torch's compiler, and for tensors that are divided among processes torch.distributed's. A verb that does
neither waits a third less without them (docs/log.md).

Nothing is taken away. A torch that was built without torch.distributed is one of transformers' cases. The
compiler is imported late: a module stands in its place that notes the marks, and whoever asks it for anything
else gets the whole of it, with the marks made up for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
# of its parts, the one that transformers' masks are made with: it stands alone
ALONE = f"{COMPILER}._trace_wrapped_higher_order_op"
_lock = threading.RLock()


class LateModule(ModuleType):
    """A module that is executed when a name is asked of it that it was not given.

    Given names hold until then; those of the module itself come in their place.
    """

    melinoe_given: dict[str, Any]
    melinoe_later: list[Callable[[], object]]  # to be done when it has been executed
    melinoe_begun: bool

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what looks at modules asks for such names, and needs none of it
            raise AttributeError(name)
        with _lock:
            if isinstance(self, LateModule):
                if self.melinoe_begun:  # as of any module that is half executed
                    raise AttributeError(f"partially initialized module {self.__name__!r} has no {name!r}")
                _execute(self)
        return getattr(self, name)


def _execute(module: LateModule) -> None:
    module.melinoe_begun = True
    for name in module.melinoe_given:
        delattr(module, name)
    assert module.__spec__ is not None and module.__spec__.loader is not None
    module.__spec__.loader.exec_module(module)
    module.__class__ = ModuleType  # type: ignore[assignment]
    for act in module.melinoe_later:
        act()


class _PartsAfterTheWhole(MetaPathFinder, Loader):
    """Executes the late package before a part of it is imported, as every import of a part does."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        module = sys.modules.get(COMPILER)
        if not name.startswith(f"{COMPILER}.") or name == ALONE or not isinstance(module, LateModule):
            return None
        with _lock:
            if module.melinoe_begun:
                return None
            sys.meta_path.remove(self)
            _execute(module)
        if name not in sys.modules:
            return None
        self.part = sys.modules[name]  # the whole has imported it: it must not be executed again
        self.own, self.part.__spec__ = self.part.__spec__, None  # which importlib would follow else
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.part

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own


def postpone_compiler() -> None:
    """Puts a late module where torch's compiler would be; nothing where that was imported already."""
    import torch

    spec = None if COMPILER in sys.modules else importlib.util.find_spec(COMPILER)
    if spec is None or spec.loader is None:
        return
    module = LateModule(COMPILER)
    given = {mark: _noting(module, mark) for mark in ("assume_constant_result", "allow_in_graph")}
    module.melinoe_given = {**given, "disable": _disabling(module)}
    module.melinoe_later, module.melinoe_begun = [], False
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    module.__package__, module.__path__ = COMPILER, spec.submodule_search_locations or []
    vars(module).update(module.melinoe_given)
    torch._dynamo = sys.modules[COMPILER] = module  # type: ignore[assignment]
    sys.meta_path.insert(0, _PartsAfterTheWhole())


def _noting(module: LateModule, mark: str) -> Callable[[Any], Any]:
    """A decorator that returns what it is given, as the compiler's does, which marks it later."""

    def note(function: Any) -> Any:
        module.melinoe_later.append(lambda: getattr(module, mark)(function))
        return function

    return note


def _disabling(module: LateModule) -> Callable[..., Any]:
    """The compiler's `disable`: as long as there is no compiler, a function runs as it is."""

    def disable(function: Any = None, *given: Any, **settings: Any) -> Any:
        if function is None:
            return lambda later: disable(later, *given, **settings)

        @functools.cache
        def disabled() -> Any:
            return sys.modules[COMPILER].disable(function, *given, **settings)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            known = function if isinstance(module, LateModule) else disabled()
            return known(*args, **kwargs)

        return run

    return disable


def import_transformers() -> None:
    """Imports torch and transformers' models for a process that is alone and need not compile.

    What was imported before stays as it is. transformers takes this torch for one that was built without
    torch.distributed, for as long as the process lives.
    """
    import torch.distributed

    if "transformers.modeling_utils" in sys.modules:
        return
    postpone_compiler()
    was = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        importlib.import_module("transformers.modeling_utils")
    finally:
        torch.distributed.is_available = was
