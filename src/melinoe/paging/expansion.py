"""Where packed records become weights: when they arrive in a slot, or where a packed slot is used.

`packed` slots hold the record as it is on disk, so that the same memory holds two to four times the experts.
Few rows are computed from it as it lies (melinoe.store.kernels); for many, or where there is no kernel,
`Scratch` expands a matrix when it is used. `expanded` slots hold weights of full size; `ExpandingReader`
stands before another reader, has the packed record read into a buffer of its own and expands it into the
slot, on threads of its own.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from melinoe.errors import MelinoeError
from melinoe.native import gathered
from melinoe.paging.reader import READER_THREADS, Reader
from melinoe.paging.slots import RecordBuffer
from melinoe.store import kernels, rounding
from melinoe.store.layout import Field, RecordLayout, torch_dtype
from melinoe.store.manifest import Store
from melinoe.store.packing import SCALE, Packing, is_matrix
from melinoe.store.record_file import StoredLayer

SLOTS_FORMATS = ("packed", "expanded")


def slots_packed(store: Store, slots_format: str | None, device: str | torch.device = "cpu") -> bool:
    """Whether slots hold packed records; None: they do where this machine computes them as they lie.

    Args:
        device: where the slots are.

    Raises:
        MelinoeError: no such choice, or packed slots for a store whose records are not packed.
    """
    if slots_format is not None and slots_format not in SLOTS_FORMATS:
        raise MelinoeError("unknown format of slots", got=slots_format, allowed=", ".join(SLOTS_FORMATS))
    if store.record_format == "auto":
        if slots_format == "packed":
            raise MelinoeError(
                f"the records of {store.folder} are not packed",
                got="slots format packed",
                allowed="expanded",
                next_step="pack them with: melinoe convert --format int8",
            )
        return False
    if slots_format is None:
        packings = [layer.packing for layer in store.layers]
        return all(packing is not None and _computed(packing, torch.device(device)) for packing in packings)
    return slots_format == "packed"


def _computed(packing: Packing, device: torch.device) -> bool:
    """Whether records are computed as they lie, or can be once they are brought into another order."""
    if packing.form != "kernel":
        return False
    matrices = [field for field in packing.expanded.fields if is_matrix(field)]
    dtypes = {torch_dtype(field.dtype) for field in matrices}
    if device.type != "cpu":  # experts of two matrices, of which the first is twice as wide
        up, *down = packing.expanded.fields
        plain = len(down) == 1 and matrices == [up, *down] and not packing.transposed
        if not plain or up.shape[0] != 2 * down[0].shape[1] or not dtypes <= set(gathered.DTYPES):
            return False
        return gathered.usable(device) and kernel_form(packing, down[0].shape[1], packing.tile).computed
    tile = kernels.machine_tile() if packing.format == "int4" else packing.tile
    return dtypes == {kernels.DTYPE} and tile is not None and kernels.usable(packing.format, tile)


def kernel_form(packing: Packing, inner: int, tile: int) -> gathered.Form:
    """How the matrices of a packed expert lie, as a GPU's kernels are told; `computed` says whether they can.

    Args:
        inner: I. tile: of the codes where they are.
    """
    read_only = packing.form != "kernel" or packing.transposed
    return gathered.Form(inner, "another" if read_only else packing.format, tile)


def slot_layout(layer: StoredLayer, packed: bool) -> RecordLayout:
    """What a slot of a layer holds."""
    return layer.layout if packed or layer.packing is None else layer.packing.expanded


def slot_records(store: Store, packed: bool) -> list[tuple[int, int]]:
    """(number of experts, bytes of a slot) of each layer, as the budget asks for them."""
    return [(layer.num_experts, slot_layout(layer, packed).record_bytes) for layer in store.layers]


def expansion_bytes(store: Store, packed: bool) -> int:
    """Memory beside slots and staging: the scratch record, or the buffers of the expanding reader."""
    if store.record_format == "auto":
        return 0
    if packed:
        return max(slot_layout(layer, False).record_bytes for layer in store.layers)
    return READER_THREADS * store.max_record_bytes


class PackedExpert(Mapping[str, torch.Tensor]):
    """The tensors of one expert in a packed record: each is expanded when it is asked for.

    layer: what it has in common with the layer's others. packed: the tensors of the record.
    They hold until the scratch record is used for another expert.
    """

    def __init__(self, layer: ScratchLayer, packed: Mapping[str, torch.Tensor]) -> None:
        self.layer, self.packed = layer, packed
        self._expanded: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self.layer.views[name]
        if name not in self._expanded:
            layer = self.layer
            layer.packing.expand_one(layer.fields[name], self.packed, weight, layer.tile)
            self._expanded.add(name)
        return weight

    @property
    def few_rows(self) -> int:
        """Up to so many rows are computed from the record as it lies."""
        return self.layer.few_rows

    def product(self, rows: torch.Tensor, name: str) -> torch.Tensor | None:
        """rows [N, in] by the matrix, [N, out], as it lies; None where it is to be expanded.

        Which of the two it is depends on the record's format, the number of rows and the machine alone.
        """
        layer = self.layer
        if len(rows) > layer.few_rows or rows.dtype != kernels.DTYPE or rows.requires_grad:
            return None
        packed = self.packed
        return kernels.product(
            layer.packing.format, rows, packed[name], packed[name + SCALE], layer.out[name]
        )

    def gated(
        self, others: Sequence[PackedExpert], rows: torch.Tensor, up: str, down: str
    ) -> torch.Tensor | None:
        """This expert and others of its layer, with silu, on the same rows, from their records as they lie.

        Args:
            rows: [N, H].
            up, down: names of the matrices [2 * I, H] and [H, I].

        Returns:
            [E * N, H], expert by expert; None where it is to be done step by step. Which of the two depends
            on what `product` depends on, and on the number of threads.
        """
        layer = self.layer
        if not 0 < len(rows) <= layer.few_rows or rows.dtype != kernels.DTYPE or rows.requires_grad:
            return None
        matrices = [(one.matrix(up), one.matrix(down)) for one in (self, *others)]
        return kernels.gated(layer.packing.format, rows, matrices, layer.out[up] // 2)

    def matrix(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes and the scales of a matrix."""
        return self.packed[name], self.packed[name + SCALE]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layer.views)

    def __len__(self) -> int:
        return len(self.layer.views)


class ScratchLayer:
    """What the packed experts of one layer have in common.

    views: of the scratch record, as the module's own parameters. tile: of int4 codes in the slots.
    few_rows: up to which the kernel is used, 0 where there is none. out: of each matrix, its outputs.
    """

    def __init__(self, packing: Packing, record: torch.Tensor, tile: int) -> None:
        self.packing, self.tile = packing, tile
        self.fields = {field.name: field for field in packing.expanded.fields}
        self.views = {name: _scratch_view(record, field, packing) for name, field in self.fields.items()}
        on_cpu = record.device.type == "cpu"
        computed = on_cpu and _computed(packing, record.device) and kernels.usable(packing.format, tile)
        self.few_rows = kernels.FEW_ROWS[packing.format] if computed else 0
        self.out = {name: packing.out_in(field)[0] for name, field in self.fields.items() if is_matrix(field)}


def _packing(stored: StoredLayer) -> Packing:
    assert stored.packing is not None
    return stored.packing


def _scratch_view(record: torch.Tensor, field: Field, packing: Packing) -> torch.Tensor:
    """A tensor of the scratch record; its weights lie in memory in the order of the codes."""
    flat = record[field.offset : field.offset + field.nbytes].view(torch_dtype(field.dtype))
    if not is_matrix(field) or packing.form == "grouped":
        return flat.view(field.shape)
    size_out, size_in = packing.out_in(field)
    as_codes = packing.format == "int8"
    weight_OI = flat.view(size_out, size_in) if as_codes else flat.view(size_in, size_out).T
    return weight_OI.T if packing.transposed else weight_OI


class Scratch:
    """One record of full size that matrices of packed ones are expanded into, one after the other.

    Args:
        tiles: of int4 codes in the slots of each layer.
    """

    def __init__(self, store: Store, device: torch.device, tiles: list[int]) -> None:
        layouts = [slot_layout(layer, False) for layer in store.layers]
        self.buffer = RecordBuffer(1, max(layout.record_bytes for layout in layouts), device)
        self._layers = [
            ScratchLayer(_packing(layer), self.buffer.tensor[0, : layout.record_bytes], tile)
            for layer, layout, tile in zip(store.layers, layouts, tiles, strict=True)
        ]

    def expert(self, layer: int, packed: Mapping[str, torch.Tensor]) -> PackedExpert:
        """A packed record as an expert; what it gives holds until the next call."""
        return PackedExpert(self._layers[layer], packed)


class Retiling:
    """Brings the int4 codes of a record that has arrived into the order of this machine, in its slot.

    tiles: of each layer's codes in the slots.
    """

    def __init__(self, store: Store) -> None:
        self._layers = store.layers
        self.tiles = []
        for layer in store.layers:
            assert layer.packing is not None
            own = kernels.machine_tile() if layer.packing.tile else None
            self.tiles.append(own or layer.packing.tile)

    @property
    def needed(self) -> bool:
        stored = [layer.packing.tile for layer in self._layers if layer.packing is not None]
        return stored != self.tiles

    def __call__(self, layer: int, record: torch.Tensor) -> None:
        stored = self._layers[layer]
        assert stored.packing is not None
        if stored.packing.tile == self.tiles[layer]:
            return
        views = stored.layout.views(record)
        for field in stored.packing.expanded.fields:
            if is_matrix(field):
                rounding.retile(views[field.name], self.tiles[layer])


class ExpandingReader:
    """A `Reader` that has packed records read and expands them to full size; counts packed bytes.

    Each of a few threads has a buffer for one packed record. On an accelerator the buffers are device memory
    and the expansion runs on a stream of its own: behind the slot's last use, and ahead of the next copy into
    the same buffer, by events alone.
    """

    def __init__(self, reader: Reader, store: Store, threads: int = READER_THREADS) -> None:
        self.reader, self.store = reader, store
        self.device = reader.device
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.buffers = RecordBuffer(threads, store.max_record_bytes, self.device)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(threads):
            self._free.put(index)
        self._pool = self._new_pool()
        self._lock = threading.Lock()  # one expansion is launched at a time on a stream

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.buffers.count, thread_name_prefix="melinoe-expand")

    @property
    def bytes_read(self) -> int:
        return self.reader.bytes_read

    @property
    def busy_seconds(self) -> float:
        return self.reader.busy_seconds

    def read(self, layer: int, expert: int, destination: torch.Tensor) -> Future[Any]:
        """Starts moving one record; `destination` is a full-size record (uint8)."""
        after = None
        if self._stream is not None:
            after = torch.cuda.current_stream(self.device).record_event()
        return self._pool.submit(self._read, layer, expert, destination, after)

    def _read(self, layer: int, expert: int, destination: torch.Tensor, after: Any) -> Any:
        stored = self.store.layers[layer]
        assert stored.packing is not None
        index = self._free.get()
        try:
            packed = self.buffers.record(index, stored.layout.record_bytes)
            views = stored.layout.views(packed), stored.packing.expanded.views(destination)
            if self._stream is None:
                self.reader.arrived(self.reader.read(layer, expert, packed).result())
                stored.packing.expand(*views)
                return None
            with torch.cuda.stream(self._stream):
                moved = self.reader.read(layer, expert, packed).result()
                with self._lock:
                    self._stream.wait_event(after)
                    self.reader.arrived(moved)
                    stored.packing.expand(*views)
                    return self._stream.record_event()
        finally:
            self._free.put(index)

    def drain(self) -> None:
        self._pool.shutdown(wait=True)
        self._pool = self._new_pool()
        self.reader.drain()

    def arrived(self, event: Any) -> None:
        """Makes the caller's stream wait for an expanded record; the host goes on."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self.reader.close()
