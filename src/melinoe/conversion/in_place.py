"""A store without a copy of the experts: an index over the checkpoint's own shards.

Where transformers only stacks and concatenates an expert's tensors (Mixtral, OLMoE, Qwen, DeepSeek), or keeps
the experts of a layer in one tensor, the bytes of a record stand in the checkpoint as they are, in a few
pieces. Which pieces, is asked of transformers' own converters: they are run on small tensors of numbers that
name each element, and what comes out says where every element went. One expert of the first and the last
layer is compared byte by byte with what the converters make of the real tensors.

The folder holds links to the shards, so that from_pretrained finds the resident weights there too.
"""

from __future__ import annotations

import json
import math
import os
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from melinoe.conversion import checkpoint
from melinoe.conversion.build import copy_small_files, finish
from melinoe.conversion.checkpoint import Shards, Sources
from melinoe.errors import MelinoeError
from melinoe.files import empty, partial_folder, write_json
from melinoe.models.folder import local_folder, resolve_model, skeleton
from melinoe.models.layers import experts_modules, fingerprint, moe_layers
from melinoe.store.layout import RecordLayout, torch_dtype
from melinoe.store.manifest import MANIFEST, Store, is_store, open_store
from melinoe.store.record_file import StoredLayer, layer_to_json


class NotInPlaceError(MelinoeError):
    """The checkpoint's bytes are not those of the records; it must be converted."""


def index_in_place(source: str | Path, target: str | Path) -> Store:
    """Makes an in-place store of a checkpoint: seconds, and no copy of any weight.

    Args:
        source: model folder, Hub id, or `tiny`.
        target: folder to make; an in-place store that stands there is replaced.

    Raises:
        NotInPlaceError: the experts are transposed, interleaved, quantised or of another dtype in the
            checkpoint.
        MelinoeError: no such model, a dense model, or a target in the way.
    """
    folder, target = local_folder(resolve_model(source)), Path(target)
    model = skeleton(folder)
    moe_layers(model)
    if checkpoint.dequantizer(model.config) is not None:
        raise _not("the checkpoint is quantised")
    shards = Shards(folder)
    expert_plan, rest = checkpoint.plan(model, shards.names())
    layers = _layers(model, shards, expert_plan)
    for layer in (layers[0], layers[-1]):
        _compare(model, shards, expert_plan, layer)
    known = fingerprint(model) if not checkpoint.load_routers(model, shards, rest) else ""
    if target.exists() and not is_in_place(target) and (not target.is_dir() or any(target.iterdir())):
        raise MelinoeError(f"{target} exists", allowed="a new folder", next_step="choose another name")
    with partial_folder(target) as partial:
        if is_in_place(target) and _is_of(target, shards):
            partial.rmdir()
            return open_store(target)  # another process has made it meanwhile
        empty(partial)
        for file in shards.files:
            (partial / file.name).symlink_to(file.resolve())
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            (partial / index.name).write_bytes(index.read_bytes())
        copy_small_files(folder, partial)
        finish(partial, target, layers, uuid.uuid4().hex, str(source), known, tuple(shards.stamps))
    return open_store(target)


def _not(reason: str) -> NotInPlaceError:
    return NotInPlaceError(
        "this checkpoint's experts cannot be read in place", got=reason, next_step="convert it"
    )


def is_in_place(folder: Path) -> bool:
    """Whether a folder says that it is an in-place store; its shards may have changed since."""
    try:
        return is_store(folder) and bool(json.loads((folder / MANIFEST).read_text()).get("shards"))
    except (OSError, json.JSONDecodeError, AttributeError):
        return False


def _is_of(target: Path, shards: Shards) -> bool:
    """Whether an in-place store is the index of these shards as they are."""
    try:
        return open_store(target).shards == tuple(shards.stamps)
    except MelinoeError:
        return False


def _layers(model: nn.Module, shards: Shards, expert_plan: dict[str, Sources]) -> list[StoredLayer]:
    """The pieces of every layer's records."""
    number = {file: index for index, file in enumerate(shards.files)}
    layers = []
    for name, module in experts_modules(model):
        layout, num_experts = RecordLayout.of(module), int(module.num_experts)  # type: ignore[arg-type]
        pieces: list[tuple[int, int]] = []
        sources: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
        for field in layout.fields:
            target = f"{name}.{field.name}"
            found = _pieces(model, shards, target, expert_plan[target], num_experts)
            lengths = [length for _, _, length in found[0]]
            if sum(lengths) != field.nbytes:
                raise _not(f"{target} has {sum(lengths)} bytes there, not {field.nbytes}")
            place = field.offset
            for length in lengths:
                pieces.append((place, length))
                place += length
            for expert, one in enumerate(found):
                if [length for _, _, length in one] != lengths:
                    raise _not(f"the experts of {target} differ in size")
                sources[expert] += [(number[path], start) for path, start, _ in one]
        layers.append(
            StoredLayer(name, "", num_experts, layout, 0, (), tuple(pieces), tuple(map(tuple, sources)))
        )
    return layers


def _pieces(
    model: nn.Module, shards: Shards, target: str, sources: Sources, num_experts: int
) -> list[list[tuple[Path, int, int]]]:
    """For each expert of one parameter: (file, byte offset, bytes) of its pieces, in order."""
    converter, names = sources
    checkpoint.check_counts(shards, target, names, num_experts)
    dtype, groups = model.get_parameter(target).dtype, list(names.values())
    entries = [[shards.entries[name] for name in group] for group in groups]
    for entry, name in ((e, n) for es, ns in zip(entries, groups) for e, n in zip(es, ns)):
        if entry.dtype != dtype:
            raise _not(f"{name} is {entry.dtype}, the model computes in {dtype}")
    if converter is None:
        [fused] = entries
        if fused[0].shape != tuple(model.get_parameter(target).shape):
            raise _not(f"{target} has another shape there")
        order = [0]
    else:
        patterns = [(p, entries[i], g) for i, (p, g) in enumerate(names.items())]
        order = _order(model, target, converter, patterns, num_experts)
    result: list[list[tuple[Path, int, int]]] = []
    for expert in range(num_experts):
        one = []
        for index in order:
            if checkpoint.per_expert(groups[index], num_experts):
                entry = entries[index][expert]
                one.append((entry.path, entry.start, entry.nbytes))
            else:
                entry = entries[index][0]
                length = entry.nbytes // num_experts
                one.append((entry.path, entry.start + expert * length, length))
        result.append(one)
    return result


def _order(
    model: nn.Module,
    target: str,
    converter: checkpoint.WeightConverter,
    patterns: list[tuple[str, list[checkpoint.Entry], list[str]]],
    num_experts: int,
) -> list[int]:
    """In which order a converter lays whole tensors behind each other.

    The converter runs on small stand-ins whose elements are all different: every size of the real shapes
    gets a small even one, the same size the same one. Its steps look at no sizes (`separable` lets only such
    steps pass), so what they do to the stand-ins is what they do to the tensors.

    Raises:
        NotInPlaceError: elements of a tensor come apart.
    """
    if not checkpoint.separable(converter):
        raise _not(f"{target} goes through {converter.operations}")
    shapes = []
    for _, entries, group in patterns:
        each = checkpoint.per_expert(group, num_experts)
        if any(entry.shape != entries[0].shape for entry in entries):
            raise _not(f"the experts of {target} differ in shape")
        shapes.append(entries[0].shape if each else (1, *entries[0].shape[1:]))
    sizes = sorted({size for shape in shapes for size in shape if size != 1})
    small = {1: 1} | {size: 2 * index + 4 for index, size in enumerate(sizes)}
    stand_ins, begin = [], 0
    for shape in shapes:
        shrunk = [small[size] for size in shape]
        stand_ins.append(torch.arange(begin, begin + math.prod(shrunk)).view(shrunk))
        begin += stand_ins[-1].numel()
    given = {pattern: [stand_in] for (pattern, _, _), stand_in in zip(patterns, stand_ins)}
    result = checkpoint.run_converter(model, converter, target, given).flatten()
    first = {int(stand_in.flatten()[0]): index for index, stand_in in enumerate(stand_ins)}
    order, place = [], 0
    while place < len(result):
        index = first.get(int(result[place]), -1)
        whole = stand_ins[index].flatten() if index >= 0 else result[:0]
        if index < 0 or not torch.equal(result[place : place + len(whole)], whole):
            raise _not(f"{target} is not a plain concatenation of {', '.join(p for p, _, _ in patterns)}")
        order.append(index)
        place += len(whole)
    if sorted(order) != list(range(len(patterns))):
        raise _not(f"{target} does not take every tensor once")
    return order


def _compare(model: nn.Module, shards: Shards, expert_plan: dict[str, Sources], layer: StoredLayer) -> None:
    """Compares the last expert of a layer with what the converters make of it, byte by byte."""
    expert = layer.num_experts - 1
    record = torch.zeros(layer.layout.record_bytes, dtype=torch.uint8)
    for (place, length), (shard, start) in zip(layer.pieces, layer.sources[expert]):
        with shards.files[shard].open("rb") as file:
            file.seek(start)
            file.readinto(memoryview(record.numpy())[place : place + length])  # type: ignore[attr-defined]
    views = layer.layout.views(record)
    for field in layer.layout.fields:
        target = f"{layer.experts_name}.{field.name}"
        made = checkpoint.one_expert(model, shards, target, expert_plan[target], layer.num_experts, expert)
        assert made.dtype == torch_dtype(field.dtype)
        if not torch.equal(made.view(torch.uint8), views[field.name].view(torch.uint8)):
            raise _not(f"expert {expert} of {target} has other bytes there")


def checked_records(store: Store) -> tuple[list[str], bool]:
    """Reads every expert of an in-place store.

    Returns:
        The names of the experts whose bytes are not those of the first check, and whether there was a first
        check; if not, what was read now is remembered for the next one.
    """
    damaged, layers = [], []
    known = all(layer.checksums for layer in store.layers)
    for layer in store.layers:
        checksums = tuple(_checksums(store, layer))
        for expert, (found, expected) in enumerate(zip(checksums, layer.checksums, strict=False)):
            if found != expected:
                damaged.append(f"expert {expert} of {layer.experts_name}")
        layers.append(replace(layer, checksums=checksums))
    if not known:
        path = store.folder / MANIFEST
        manifest = json.loads(path.read_text())
        manifest["layers"] = [layer_to_json(layer) for layer in layers]
        write_json(path, manifest)
    return damaged, known


def _checksums(store: Store, layer: StoredLayer) -> Iterator[int]:
    """CRC-32 of each expert's pieces, one after the other."""
    for sources in layer.sources:
        checksum = 0
        for (_, length), (shard, start) in zip(layer.pieces, sources):
            with (store.folder / store.shards[shard].file).open("rb") as file:
                file.seek(start)
                checksum = zlib.crc32(file.read(length), checksum)
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)
        yield checksum
