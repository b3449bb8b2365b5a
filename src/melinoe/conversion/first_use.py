"""The store of a model: the one that was named, or one that is made of a checkpoint on first use."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import sys
from pathlib import Path

from melinoe.config import home
from melinoe.conversion.build import SMALL_FILES
from melinoe.conversion.checkpoint import Checkpoint
from melinoe.conversion.convert import convert
from melinoe.conversion.in_place import NotInPlaceError, index_in_place, is_in_place
from melinoe.conversion.upgrade import open_upgraded
from melinoe.errors import MelinoeError
from melinoe.models.folder import local_folder, resolve_model
from melinoe.models.pretrained import read_config
from melinoe.models.weights import weight_files
from melinoe.store.manifest import Store, is_store, open_store


def store_of(source: str | Path) -> Store:
    """Opens the store of a source; a checkpoint is indexed in place on first use, or else converted.

    Args:
        source: a store, or a checkpoint (folder, Hub id, `tiny`), whose store goes into $MELINOE_HOME/stores.

    Raises:
        MelinoeError: no such model, a dense model, or a damaged store.
    """
    resolved = resolve_model(source)
    if isinstance(resolved, Path) and is_store(resolved):
        return open_upgraded(resolved)
    folder = local_folder(resolved)
    # config and tokenizer too: the store has copies of them
    found = {file for file in folder.iterdir() if file.suffix in (".safetensors", *SMALL_FILES)}
    files = sorted(found | set(weight_files(folder, read_config(folder))))
    stamp = "".join(
        f"{file.relative_to(folder)}{file.stat().st_size}{file.stat().st_mtime_ns}" for file in files
    )
    key = hashlib.sha256(f"{folder.resolve()}{stamp}".encode()).hexdigest()[:12]
    target = home() / "stores" / f"{folder.resolve().name}-{key}"
    if is_store(target):  # of one that is whole nothing is written: its folder may be read-only
        with contextlib.suppress(MelinoeError):
            return open_store(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = (target.parent / f"{target.name}.lock").open("w")
    except OSError as error:
        raise MelinoeError(
            f"the store of {source} cannot be made",
            got=error,
            next_step="make its folder writable, or set MELINOE_HOME to one that is",
        ) from None
    with file as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits for the first, and finds its store
        store = _made_before(target)
        if store is not None:
            return store
        checkpoint = Checkpoint(folder, source)
        try:
            return index_in_place(checkpoint, target)
        except NotInPlaceError as reason:
            print(f"melinoe: converting {source} into {target}: {reason}", file=sys.stderr)
            return convert(checkpoint, target)


def _made_before(target: Path) -> Store | None:
    """The store that an earlier use has made; None also where it is in place and its shards have changed."""
    if not is_store(target):
        return None
    try:
        return open_upgraded(target)
    except MelinoeError:
        if is_in_place(target):  # the shards were touched since: the index is made anew
            return None
        raise
