"""What the rows of `melinoe bench` read: widened weights, stores in every format, GGUF files.

All of it lies in one folder, each part under the name of what it is. A part is complete or not there
(melinoe.files), so an interrupted bench finds what it had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import GenerationConfig

from melinoe.adapters.merge import merge
from melinoe.benchmark import llama_cpp
from melinoe.benchmark.entries import ACCELERATE, BASE, LLAMA_CPP, OURS, Entry
from melinoe.benchmark.gguf_file import gguf_available, write_gguf
from melinoe.conversion.checkpoint import Checkpoint
from melinoe.conversion.convert import convert
from melinoe.conversion.first_use import store_of
from melinoe.data.encoding import encode_prompt
from melinoe.data.rows import Row
from melinoe.demonstration.peers import write_disk_offload
from melinoe.demonstration.widen import widen
from melinoe.errors import MelinoeError
from melinoe.files import whole_folder
from melinoe.models.folder import local_folder, resolve_model
from melinoe.models.pretrained import read_config
from melinoe.runtime.generation_settings import end_tokens
from melinoe.runtime.load import load_resident, load_tokenizer
from melinoe.store.layout import RecordLayout
from melinoe.store.manifest import Store, is_store, open_store

MAX_PROMPT = 160  # tokens; longer prompts are left out of the speed rows


@dataclass
class Arena:
    """Everything that the rows share.

    checkpoints: {weights: folder}, widened where the records were to be larger.
    stores: {(weights, format): folder}. gguf: {(weights, precision): file}.
    offload: accelerate's folder, or None.
    skipped: {row: why it cannot run}. plain: {weights: folder} as they were before widening.
    """

    folder: Path
    checkpoints: dict[str, Path]
    stores: dict[tuple[str, str], Path]
    gguf: dict[tuple[str, str], Path]
    offload: Path | None
    skipped: dict[str, str]
    plain: dict[str, Path]

    @property
    def store(self) -> Store:
        """The base's experts in their own dtype."""
        return open_store(self.stores[BASE, "auto"])


def prepare(
    models: dict[str, str | Path],
    rows: list[Entry],
    folder: Path,
    record_bytes: int,
    seed: int,
    note: Callable[[str], None],
) -> Arena:
    """Makes what is not there yet.

    Args:
        models: {weights: checkpoint, or an adapter of the base}.
        record_bytes: experts that are smaller are widened to records of this size; 0: as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        name: _plain(name, source, models[BASE], folder, note)
        for name, source in models.items()
        if name == BASE or any(row.weights == name for row in rows)
    }
    checkpoints = {
        name: _widened(name, source, folder, record_bytes, seed, note) for name, source in plain.items()
    }
    arena = Arena(folder, checkpoints, {}, {}, None, {}, plain)
    arena.stores[BASE, "auto"] = _store(checkpoints[BASE], BASE, "auto", folder, note)
    for row in rows:
        if row.kind == OURS:
            key = row.weights, row.precision
            if key not in arena.stores:
                arena.stores[key] = _store(checkpoints[row.weights], *key, folder, note)
        elif row.kind == LLAMA_CPP:
            reason = _write_gguf(arena, row, note)
            if reason:
                arena.skipped[row.name] = reason
        elif row.kind == ACCELERATE:
            arena.offload = _offload(arena, note)
    return arena


def _plain(
    name: str, source: str | Path, base: str | Path, folder: Path, note: Callable[[str], None]
) -> Path:
    """A checkpoint: what was named, or an adapter merged into the base."""
    target = Path(source)
    if (target / "adapter_config.json").is_file():
        target = folder / f"{name}-merged"
        if not target.is_dir():
            note(f"merging {name}")
            merge(base, source, target)
        return target
    return local_folder(resolve_model(source))


def _widened(
    name: str, target: Path, folder: Path, record_bytes: int, seed: int, note: Callable[[str], None]
) -> Path:
    if not record_bytes or _record_bytes(target) >= record_bytes:
        return target
    wide = folder / name
    if not wide.is_dir():
        note(f"widening {name}")
        widen(target, wide, record_bytes, seed)
    return wide


def _record_bytes(checkpoint: Path) -> int:
    if is_store(checkpoint):
        raise MelinoeError(f"{checkpoint} is a store", allowed="the checkpoint it was made from")
    return max(RecordLayout.of(layer.experts).record_bytes for layer in Checkpoint(checkpoint).layers)


def _store(checkpoint: Path, weights: str, format: str, folder: Path, note: Callable[[str], None]) -> Path:
    target = folder / f"{weights}-{format}"
    if format == "auto" and checkpoint.parent != folder:  # not made here: an index is enough where it can be
        return store_of(checkpoint).folder
    if not is_store(target):
        note(f"converting {weights} to {format}")
        convert(checkpoint, target, format=format, progress=False)
    return target


def _write_gguf(arena: Arena, row: Entry, note: Callable[[str], None]) -> str:
    """Why this row of llama.cpp cannot run; "" where its file is there."""
    for found, package in ((gguf_available(), "gguf"), (llama_cpp.available(), "xllamacpp")):
        if not found:
            return f"{package} is not installed: pip install 'melinoe-moe[bench]'"
    path = arena.folder / f"{row.weights}-{row.precision}.gguf"
    if not path.is_file():
        note(f"writing {path.name}")
        try:
            write_gguf(arena.checkpoints[row.weights], path, row.precision)
        except MelinoeError as error:
            return str(error)
    arena.gguf[row.weights, row.precision] = path
    return ""


def _offload(arena: Arena, note: Callable[[str], None]) -> Path:
    folder = arena.folder / "accelerate"
    if not folder.is_dir():
        note("writing accelerate's offload folder")
        model, _ = load_resident(arena.checkpoints[BASE])
        with whole_folder(folder) as new:
            write_disk_offload(model, new)
    return folder


def prompts_of(rows: list[Row] | None, checkpoint: Path, count: int, seed: int) -> list[list[int]]:
    """Token ids of the prompts that all rows answer: of the data, or random ones where there is none.

    Raises:
        MelinoeError: no row of the data is short enough.
    """
    tokenizer: Any = load_tokenizer(checkpoint)
    if rows is None:
        generator = np.random.default_rng(seed)
        return generator.integers(3, len(tokenizer), (count, MAX_PROMPT // 4)).tolist()
    found = []
    for row in rows:
        if not row.messages:
            continue
        ids = encode_prompt(tokenizer, row)
        if len(ids) <= MAX_PROMPT:
            found.append(ids)
        if len(found) == count:
            break
    if not found:
        raise MelinoeError(
            "no prompt is short enough for the speed rows", allowed=f"up to {MAX_PROMPT} tokens"
        )
    return found


def ends_of(checkpoint: Path) -> list[int]:
    """The tokens that end a generation, which no row may choose."""
    try:
        settings = GenerationConfig.from_pretrained(checkpoint)
    except OSError:  # none is written
        settings = GenerationConfig.from_model_config(read_config(checkpoint))
    return end_tokens(settings, load_tokenizer(checkpoint))
