"""Whether a verb may write where it was told to: one rule for all of them.

- An output is not, does not contain and does not lie in anything that is read; links are followed.
- What stands there already is replaced only if all of it was written by melinoe as the same kind of thing.
  Every kind says so of itself: a folder by a card, a file by its format.
- The old one goes when the new one is complete (melinoe.files), and the rule is asked again right before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from melinoe.errors import MelinoeError


@dataclass(frozen=True)
class Kind:
    """A kind of thing that melinoe writes.

    Attributes:
        name: with its article, for people.
        is_folder: or a file.
        foreign: says what at a path is not melinoe's; "" where all of it is.
    """

    name: str
    is_folder: bool
    foreign: Callable[[Path], str]


@dataclass(frozen=True)
class Output:
    """Where a verb was told to write.

    Attributes:
        path: of the file or folder.
        kind: what it is going to be.
        reads: what the verb reads, by name: paths, lists of them, or anything else, which is no path.
        replace: whether what stands there goes; None: it stays, and the verb has no --overwrite.
    """

    path: Path
    kind: Kind
    reads: dict[str, Any] = field(default_factory=dict)
    replace: bool | None = None

    def check(self) -> None:
        """Asks the rule; cheap, and so asked before the work and again before the result is put there.

        Raises:
            MelinoeError: nothing can or may be written there.
        """
        self._apart_from_what_is_read()
        self._can_be_made()
        if self.path.exists():
            self._may_go()

    def _apart_from_what_is_read(self) -> None:
        own = _identity(self.path)
        above = {_identity(folder) for folder in Path(os.path.realpath(self.path)).parents} - {None}
        for name, path in ((name, path) for name, value in self.reads.items() for path in _paths(value)):
            if _identity(path) == own:
                how = "is"
            elif path.is_dir() and _identity(path) in above:
                how = "lies in"
            elif own is not None and any(own == _identity(folder) for folder in path.parents):
                how = "contains"
            else:
                continue
            raise MelinoeError(
                f"the output {self.path} {how} the {name} that is read",
                got=path,
                next_step=f"choose {'a folder' if self.kind.is_folder else 'a file'} apart from it",
            )

    def _can_be_made(self) -> None:
        real = Path(os.path.realpath(self.path))
        place = next(folder for folder in real.parents if folder.exists())
        if not place.is_dir():
            raise MelinoeError(
                f"{self.path} cannot be made", got=f"{place}, which is a file", allowed="a folder"
            )
        if not os.access(place, os.W_OK | os.X_OK):
            raise MelinoeError(f"{self.path} cannot be made", got=f"no right to write in {place}")
        if self.kind.is_folder and real.exists() and not real.is_dir():
            raise MelinoeError(f"{self.path} is a file", allowed="a folder", next_step="choose another name")
        if not self.kind.is_folder and real.exists() and not real.is_file():
            what = "a folder" if real.is_dir() else "no plain file"
            raise MelinoeError(f"{self.path} is {what}", allowed="a file", next_step="choose another name")

    def _may_go(self) -> None:
        if self.kind.is_folder and not any(self.path.iterdir()):
            return
        noun = "folder" if self.kind.is_folder else "file"
        if self.replace is None:
            raise MelinoeError(f"{self.path} exists already", next_step=f"choose another {noun}")
        foreign = self.kind.foreign(self.path)
        if foreign:
            raise MelinoeError(
                f"{self.path} exists already and is not replaced",
                got=foreign,
                allowed=f"a new {noun}, or {self.kind.name} that melinoe wrote",
                next_step=f"choose another {noun}",
            )
        if not self.replace:
            raise MelinoeError(
                f"{self.path} exists already",
                next_step=f"choose another {noun}, or overwrite it (--overwrite)",
            )


def carded_folder(name: str, card: str, format: str, *, files: tuple[str, ...] = ()) -> Kind:
    """A folder with a card of JSON in it, whose "format" is `format` and whose "files" names the others.

    Args:
        files: of cards that name none.
    """

    def foreign(folder: Path) -> str:
        found = _json(folder / card)
        if found.get("format") != format:
            return f"a folder without the {card} of {name}"
        known = {card, *found.get("files", files)}
        others = sorted(file.name for file in folder.iterdir() if file.name not in known)
        return f"{', '.join(others[:5])}, which melinoe did not write" if others else ""

    return Kind(name, True, foreign)


def tensor_file(name: str, format: str) -> Kind:
    """A safetensors file whose metadata say "format"."""

    def foreign(path: Path) -> str:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                found = (file.metadata() or {}).get("format")
        except (SafetensorError, OSError):
            found = None
        return "" if found == format else f"a file that is not {name}"

    return Kind(name, False, foreign)


def json_file(name: str, format: str) -> Kind:
    """A file of JSON, an object whose "format" is `format`."""
    return Kind(
        name, False, lambda path: "" if _json(path).get("format") == format else f"a file that is not {name}"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _paths(value: Any) -> Iterator[Path]:
    """What is there of an input; of a folder also what links in it point to, as a model's shards may be."""
    if isinstance(value, list | tuple):
        for one in value:
            yield from _paths(one)
    elif isinstance(value, str | Path) and os.path.exists(value):
        path = Path(os.path.realpath(value))
        yield path
        if path.is_dir():
            links = (entry for entry in path.iterdir() if entry.is_symlink())
            yield from (Path(os.path.realpath(link)) for link in links)


def _identity(path: Path) -> tuple[int, int] | None:
    """The same for all names of a file; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
