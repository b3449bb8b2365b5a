"""What a forward pass of a model computes with, counted once per machine and kept in $MELINOE_HOME.

Counting runs a model's layers on shapes three times, a second for sixty of them, before every load and plan.
It hangs on nothing but the config, the sizes asked for and the code, ours and that of the libraries. A kept
count that cannot be read is counted again.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from melinoe.config import home
from melinoe.runtime.facts import code_stamp, keep
from melinoe.runtime.work_space import WorkSpace, twin, work_space

_known: dict[str, WorkSpace] = {}  # of this process


def kept_work_space(model: Any, rows: int, length: int, context: int) -> WorkSpace:
    """`work_space` of a model, which may be without its experts and weights; arguments as there."""
    key = _key(model, rows, length, context)
    file = home() / "work-space" / f"{key}.json"
    found = _known.get(key) or _read(file)
    if found is None:
        found = work_space(twin(model), rows, length, context)
        keep(file, found)
    _known[key] = found
    return found


def _key(model: Any, *sizes: int) -> str:
    config = copy.copy(model.config)
    for name in ("quantization_config", "transformers_weights"):  # of a store, which opens the same model
        vars(config).pop(name, None)
    attention = config.get_text_config()._attn_implementation
    asked = (type(model).__qualname__, config.to_json_string(), attention, str(model.dtype), *sizes)
    return hashlib.sha256(f"{asked}{code_stamp()}".encode()).hexdigest()[:24]


def _read(file: Path) -> WorkSpace | None:
    try:
        data = json.loads(file.read_text())
        counts = {field.name: data[field.name] for field in fields(WorkSpace)}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return WorkSpace(**counts) if all(type(one) is int and one >= 0 for one in counts.values()) else None
