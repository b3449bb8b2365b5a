"""Which of our sources decide what tuning or measuring does, so that a reused run of other code is named.

Read from the sources themselves, by the imports that stand in them: a list written by hand forgot the
experts' backward pass for as long as it existed.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import melinoe


def sources_of(module: str, package: Path | None = None) -> list[Path]:
    """The files of the package that `module` needs, its own among them: what it imports, and what that
    imports.

    Imports inside functions count. So do the `__init__` files on the way, and
    `importlib.import_module("a.name")`.

    Args:
        module: full name, such as melinoe.tuning.tune.
        package: folder of the package that the name begins with; None: the melinoe that is running.
    """
    package = package or Path(melinoe.__file__).parent
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _file(name, package)
        if file is None or name in found:
            continue
        found[name] = file
        parents = name.split(".")
        waiting += [".".join(parents[:length]) for length in range(1, len(parents))]
        inside = name if file.name == "__init__.py" else name.rpartition(".")[0]
        waiting += _imports(file.read_bytes(), inside)
    return sorted(found.values())


def tuning_code(package: Path | None = None) -> str:
    """A digest of everything of this package that `tune` runs; other packages are not in it."""
    return _digest(("melinoe.tuning.tune",), package)


def measuring_code(package: Path | None = None) -> str:
    """A digest of everything of this package that measures a tuned point, once it is tuned."""
    return _digest(("melinoe.adapters.merge", "melinoe.frontier.measuring"), package)


def _digest(modules: tuple[str, ...], package: Path | None) -> str:
    """A digest of the names and contents of all files that the modules need."""
    package = package or Path(melinoe.__file__).parent
    digest = hashlib.sha256()
    for source in sorted({source for module in modules for source in sources_of(module, package)}):
        digest.update(
            str(source.relative_to(package)).encode() + hashlib.sha256(source.read_bytes()).digest()
        )
    return digest.hexdigest()[:12]


def _file(name: str, package: Path) -> Path | None:
    """Where a module of the package stands; None for a name inside a module, and for other packages."""
    root, *parts = name.split(".")
    place = package.joinpath(*parts)
    files = (place / "__init__.py", place.with_suffix(".py")) if parts else (place / "__init__.py",)
    return next((file for file in files if file.is_file()), None) if root == package.name else None


@cache
def _imports(source: bytes, package: str) -> tuple[str, ...]:
    """Every name that a module of `package` may import, modules and what is in them alike."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names += [alias.name for alias in node.names]
            case ast.ImportFrom():
                origin = resolve_name("." * node.level + (node.module or ""), package)
                names += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                names.append(name)
    return tuple(names)
