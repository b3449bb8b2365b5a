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
import uuid
from dataclasses import replace
from pathlib import Path

import torch

from melinoe.conversion.build import copy_small_files, finish
from melinoe.conversion.checkpoint import Checkpoint
from melinoe.conversion.parameter import ExpertParameter, separable
from melinoe.errors import MelinoeError
from melinoe.files import empty, partial_folder, write_json
from melinoe.machine import uncollected
from melinoe.models.layers import MoeLayer
from melinoe.outputs import Kind, Output
from melinoe.store.layout import RecordLayout, torch_dtype
from melinoe.store.manifest import MANIFEST, RESIDENT_INDEX, Store, is_store, open_store
from melinoe.store.record_file import StoredLayer
from melinoe.store.shards import Stamp


class NotInPlaceError(MelinoeError):
    """The checkpoint's bytes are not those of the records; it must be converted."""


@uncollected()
def index_in_place(source: str | Path | Checkpoint, target: str | Path) -> Store:
    """Makes an in-place store of a checkpoint: seconds, and no copy of any weight.

    Args:
        source: model folder, Hub id, or `tiny`.
        target: folder to make; an in-place store that stands there is replaced.

    Raises:
        NotInPlaceError: the experts are transposed, interleaved, quantised or of another dtype in the
            checkpoint.
        MelinoeError: no such model, a dense model, or a target in the way.
    """
    target, checkpoint = Path(target), Checkpoint.open(source)
    if checkpoint.quantizer is not None:
        raise _not("the checkpoint is quantised")
    shards = checkpoint.shards
    twice = sorted(shards.repeated & set(checkpoint.resident()))
    if twice:
        raise _not(f"{twice[0]} stands in several files")
    layers = tuple(_stored(checkpoint, layer) for layer in checkpoint.layers)
    for layer in (checkpoint.layers[0], checkpoint.layers[-1]):
        _compare(checkpoint, layer, layers[layer.index])
    known = checkpoint.fingerprint()
    output = Output(target, IN_PLACE, {"model": checkpoint.folder}, replace=True)
    output.check()
    with partial_folder(target) as partial:
        if is_in_place(target) and _is_of(target, checkpoint):
            return open_store(target)  # another process has made it meanwhile
        empty(partial)
        stamps = _linked(checkpoint)
        for file, stamp in zip(shards.files, stamps, strict=True):
            (partial / stamp.file).symlink_to(file.resolve())
        _write_index(checkpoint, stamps, partial / RESIDENT_INDEX)
        copy_small_files(checkpoint, partial, RESIDENT_INDEX)
        finish(Store(partial, known, uuid.uuid4().hex, layers, checkpoint.source, stamps), target)
    return open_store(target)


def _not(reason: str) -> NotInPlaceError:
    return NotInPlaceError(
        "this checkpoint's experts cannot be read in place", got=reason, next_step="convert it"
    )


def _not_in_place(folder: Path) -> str:
    return "" if is_in_place(folder) else "a folder that is no such index"


IN_PLACE = Kind("an index of a checkpoint", True, _not_in_place)


def is_in_place(folder: Path) -> bool:
    """Whether a folder says that it is an in-place store; its shards may have changed since."""
    try:
        return is_store(folder) and bool(json.loads((folder / MANIFEST).read_text()).get("shards"))
    except (OSError, json.JSONDecodeError, AttributeError):
        return False


def _linked(checkpoint: Checkpoint) -> tuple[Stamp, ...]:
    """The stamps of a checkpoint's shards, under the names of their links, which stand in one folder."""
    shards = zip(checkpoint.shards.files, checkpoint.shards.stamps, strict=True)
    return tuple(
        replace(stamp, file="--".join(file.relative_to(checkpoint.folder).parts)) for file, stamp in shards
    )


def _write_index(checkpoint: Checkpoint, stamps: tuple[Stamp, ...], path: Path) -> None:
    """What `from_pretrained` reads of the shards: the tensors that are not experts'."""
    links = {file: stamp.file for file, stamp in zip(checkpoint.shards.files, stamps, strict=True)}
    entries = checkpoint.shards.entries
    where = {name: links[entries[name].path] for name in checkpoint.resident()}
    size = sum(entries[name].nbytes for name in where)
    write_json(path, {"metadata": {"total_size": size}, "weight_map": where}, indent=2)


def _is_of(target: Path, checkpoint: Checkpoint) -> bool:
    """Whether an in-place store is the index of a checkpoint's shards as they are."""
    try:
        return open_store(target).shards == _linked(checkpoint)
    except MelinoeError:
        return False


def _stored(checkpoint: Checkpoint, layer: MoeLayer) -> StoredLayer:
    """Where the pieces of a layer's records stand."""
    number = {file: index for index, file in enumerate(checkpoint.shards.files)}
    layout, parameters = RecordLayout.of(layer.experts), checkpoint.parameters(layer)
    pieces: list[tuple[int, int]] = []
    sources: list[list[tuple[int, int]]] = [[] for _ in range(layer.num_experts)]
    for field in layout.fields:
        parameter = parameters[field.name]
        found = _pieces(parameter)
        lengths = [length for _, _, length in found[0]]
        if sum(lengths) != field.nbytes:
            raise _not(f"{parameter.name} has {sum(lengths)} bytes there, not {field.nbytes}")
        place = field.offset
        for length in lengths:
            pieces.append((place, length))
            place += length
        for expert, one in enumerate(found):
            if [length for _, _, length in one] != lengths:
                raise _not(f"the experts of {parameter.name} differ in size")
            sources[expert] += [(number[path], start) for path, start, _ in one]
    unwritten = StoredLayer.unwritten(layer.experts_name, layer.num_experts, layout)
    return replace(unwritten, pieces=tuple(pieces), sources=tuple(map(tuple, sources)))


def _pieces(parameter: ExpertParameter) -> list[list[tuple[Path, int, int]]]:
    """(file, byte offset, bytes) of the pieces of every expert, in the parameter's order."""
    parameter.check_counts()
    groups, entries = list(parameter.sources.values()), parameter.entries()
    dtype = parameter.dtype  # looked up in the model each time it is asked for
    for entry, name in ((e, n) for es, ns in zip(entries, groups) for e, n in zip(es, ns)):
        if entry.dtype != dtype:
            raise _not(f"{name} is {entry.dtype}, the model computes in {dtype}")
    if parameter.converter is None:
        [fused] = entries
        if fused[0].shape != parameter.shape:
            raise _not(f"{parameter.name} has another shape there")
        order = [0]
    else:
        order = _order(parameter)
    result: list[list[tuple[Path, int, int]]] = []
    for expert in range(parameter.num_experts):
        one = []
        for index in order:
            if parameter.has_one_each(groups[index]):
                entry = entries[index][expert]
                one.append((entry.path, entry.start, entry.nbytes))
            else:
                entry = entries[index][0]
                length = entry.nbytes // parameter.num_experts
                one.append((entry.path, entry.start + expert * length, length))
        result.append(one)
    return result


def _order(parameter: ExpertParameter) -> list[int]:
    """In which order a parameter's converter lays whole tensors behind each other; positions in `sources`.

    The converter runs on small stand-ins whose elements are all different: every size of the real shapes
    gets a small even one, the same size the same one. Its steps look at no sizes (`separable` lets only such
    steps pass), so what they do to the stand-ins is what they do to the tensors.

    Raises:
        NotInPlaceError: elements of a tensor come apart.
    """
    assert parameter.converter is not None
    if not separable(parameter.converter):
        raise _not(f"{parameter.name} goes through {parameter.converter.operations}")
    shapes = []
    for entries, group in zip(parameter.entries(), parameter.sources.values(), strict=True):
        if any(entry.shape != entries[0].shape for entry in entries):
            raise _not(f"the experts of {parameter.name} differ in shape")
        shape = entries[0].shape
        shapes.append(shape if parameter.has_one_each(group) else (1, *shape[1:]))
    sizes = sorted({size for shape in shapes for size in shape if size != 1})
    small = {1: 1} | {size: 2 * index + 4 for index, size in enumerate(sizes)}
    stand_ins, begin = [], 0
    for shape in shapes:
        shrunk = [small[size] for size in shape]
        stand_ins.append(torch.arange(begin, begin + math.prod(shrunk)).view(shrunk))
        begin += stand_ins[-1].numel()
    given = {pattern: [stand_in] for pattern, stand_in in zip(parameter.sources, stand_ins, strict=True)}
    result = parameter.converted(given).flatten()
    first = {int(stand_in.flatten()[0]): index for index, stand_in in enumerate(stand_ins)}
    order, place = [], 0
    while place < len(result):
        index = first.get(int(result[place]), -1)
        whole = stand_ins[index].flatten() if index >= 0 else result[:0]
        if index < 0 or not torch.equal(result[place : place + len(whole)], whole):
            names = ", ".join(parameter.sources)
            raise _not(f"{parameter.name} is not a plain concatenation of {names}")
        order.append(index)
        place += len(whole)
    if sorted(order) != list(range(len(parameter.sources))):
        raise _not(f"{parameter.name} does not take every tensor once")
    return order


def _compare(checkpoint: Checkpoint, layer: MoeLayer, stored: StoredLayer) -> None:
    """Compares the last expert of a layer with what the converters make of it, byte by byte."""
    expert = layer.num_experts - 1
    record = torch.zeros(stored.layout.record_bytes, dtype=torch.uint8)
    for (place, length), (shard, start) in zip(stored.pieces, stored.sources[expert]):
        with checkpoint.shards.files[shard].open("rb") as file:
            file.seek(start)
            file.readinto(memoryview(record.numpy())[place : place + length])  # type: ignore[attr-defined]
    views, made = stored.layout.views(record), checkpoint.expert(layer, expert)
    for field in stored.layout.fields:
        assert made[field.name].dtype == torch_dtype(field.dtype)
        if not torch.equal(made[field.name].view(torch.uint8), views[field.name].view(torch.uint8)):
            raise _not(f"expert {expert} of {layer.experts_name}.{field.name} has other bytes there")
