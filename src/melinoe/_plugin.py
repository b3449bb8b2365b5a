"""Makes `AutoModelForCausalLM.from_pretrained(store)` work after `import melinoe`.

A store's config.json names a type of model and a quantizer of ours, and transformers looks both up in tables
which only its own import creates. Importing transformers here would cost every `melinoe --help` seconds.
So we register at once if transformers' table exists already, and otherwise the moment it is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

# {module of transformers that makes a table: module of ours that registers something there}
_TABLES = {
    "transformers.models.auto.configuration_auto": "melinoe.store.marking",
    "transformers.quantizers.auto": "melinoe.runtime.quantizer",
}


class _RegisterAfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one of transformers' tables as usual, once, and registers after it has been executed."""

    def __init__(self, table: str) -> None:
        self.table = table

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.table:
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
        importlib.import_module(_TABLES[self.table])


def register_when_imported() -> None:
    """Registers now or when transformers is imported; a second call changes nothing."""
    waiting = {finder.table for finder in sys.meta_path if isinstance(finder, _RegisterAfterImport)}
    for table, ours in _TABLES.items():
        if table in sys.modules:
            importlib.import_module(ours)
        elif table not in waiting:
            sys.meta_path.insert(0, _RegisterAfterImport(table))
