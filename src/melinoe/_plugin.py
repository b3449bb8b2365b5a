"""Makes `AutoModelForCausalLM.from_pretrained(store)` work after `import melinoe`.

A store names our quantizer in its config.json, and transformers looks that name up in a table which
only its own import creates. Importing transformers here would cost every `melinoe --help` seconds.
So we register at once if transformers' table exists already, and otherwise the moment it is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

_TABLE = "transformers.quantizers.auto"


def _register() -> None:
    importlib.import_module("melinoe.runtime.quantizer")


class _RegisterAfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds transformers' table as usual, once, and registers after it has been executed."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        self.original = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.original
        self.original.exec_module(module)
        _register()


def register_when_imported() -> None:
    """Registers now or when transformers is imported; a second call changes nothing."""
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())
