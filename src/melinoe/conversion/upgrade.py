"""A store of an older format becomes one of today's: in seconds, the records stay as they are.

Until format 3 transformers alone could open a store, with a warning and experts made up at random; and only
records had checksums. An upgrade gives the resident weights the name that only melinoe finds, marks the
config and writes a new manifest last, so that a call that is killed is gone on with by the next one.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

from melinoe.conversion.build import small_files
from melinoe.errors import MelinoeError
from melinoe.files import write_text
from melinoe.store.manifest import (
    RESIDENT,
    OldStoreError,
    Store,
    open_store,
    read_manifest,
    store_from,
    write_manifest,
)
from melinoe.store.marking import NOTICE, marked

_OLD_RESIDENT = "model.safetensors"


def open_upgraded(folder: Path) -> Store:
    """Opens a store; one of an older format is upgraded first, with a line on stderr.

    Raises:
        MelinoeError: as `open_store`, or the folder cannot be written.
    """
    try:
        return open_store(folder)
    except OldStoreError:
        pass
    try:
        _upgrade(folder)
    except OSError as error:
        raise MelinoeError(
            f"{folder} is a store of an older format and cannot be upgraded",
            got=error,
            next_step="make the folder writable, or convert again",
        ) from None
    print(f"melinoe: {folder} was of an older format and has been upgraded", file=sys.stderr)
    return open_store(folder)


def _upgrade(folder: Path) -> None:
    manifest = read_manifest(folder)
    store = store_from(folder, manifest)
    with contextlib.suppress(FileNotFoundError):  # another process has done it, or a call that was killed
        (folder / _OLD_RESIDENT).rename(folder / RESIDENT)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != NOTICE:
        layer = store.layers[0]
        own = layer.packing.expanded if layer.packing else layer.layout
        dtype = config.get("dtype") or config.get("torch_dtype") or own.fields[0].dtype
        settings = config["quantization_config"]
        config = marked(config, RESIDENT, dtype)
        config["quantization_config"] = {**settings, **config["quantization_config"]}
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    store = replace(store, files=small_files(store))
    write_manifest(store, {"transformers_version": manifest.get("transformers_version")})
